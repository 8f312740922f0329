package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"

	"wharf/infra/kafka"
	"wharf/infra/postgres"
	"wharf/projections"
)

type replayCmd struct {
	Models []string `arg:"" optional:"" help:"Read models to build anew."`
	All    bool     `help:"Build all of them anew."`

	Rollback bool `help:"Make the previous build of the read models the live one again, instead of building anything."`
	DryRun   bool `help:"Say what would be read and written, and do nothing."`
	NoSwap   bool `help:"Leave the new build beside the live one, to be looked at, whether it differs or not."`
	Force    bool `help:"Swap the new build in although its rows differ from the live ones, or the log ends before them; the difference is shown."`

	FromPosition *string `placeholder:"WHEN" help:"Build only of what came from there on: a position such as orders.events/3/17, or a time. Never swapped in."`
	Until        *string `placeholder:"WHEN" help:"Build only of what had happened by then: a position or a time. Never swapped in."`
	Key          *string `help:"Build only the row of this key. Never swapped in."`

	Parallel int `placeholder:"N" help:"How many partitions to read at once. Without it, one less than there are processors, which queries need."`

	JSON bool `help:"Tell the progress on stderr and the result on stdout as JSON."`
	keepFlag
	storesFlag
}

// keepFlag is how long builds that are not live are kept.
type keepFlag struct {
	KeepBuilds time.Duration `env:"WHARF_KEEP_BUILDS" default:"1h" help:"How long the previous build of a read model is kept up to date for a rollback, and a build for inspection is kept."`
}

// Run implements the subcommand.
func (c *replayCmd) Run(ctx context.Context) error {
	if c.All == (len(c.Models) > 0) {
		return usageError("name read models or say --all, one of the two")
	}
	if err := positive("--keep-builds", c.KeepBuilds); err != nil {
		return err
	}
	if c.Parallel < 0 || c.Parallel > 0 && (c.Rollback || c.DryRun) {
		return usageError("--parallel is a number of partitions, of what is built")
	}
	models, err := modelsOf(c.Models)
	if err != nil {
		return err
	}
	part, err := c.part(models)
	if err != nil {
		return err
	}
	inspect := part != postgres.Part{}
	ways := 0
	for _, way := range []bool{c.Rollback, c.DryRun, c.NoSwap || c.Force, inspect} {
		if way {
			ways++
		}
	}
	if ways > 1 || c.NoSwap && c.Force {
		return usageError("only one of --rollback, --dry-run, --no-swap, --force, and a part (--key, --from-position, --until) can be asked for")
	}
	if !c.Rollback { // which holds up live projection, for a moment
		giveWay()
		collectLess(replayGarbage, readSideMemory())
	}
	config := postgres.Config{Keep: c.KeepBuilds, Parallel: c.Parallel}
	do := func(ctx context.Context, engine *postgres.Engine) error {
		if c.DryRun {
			return c.dryRun(ctx, engine, models)
		}
		show, wait := c.progress()
		results := []replayed{}
		tell := func(p postgres.Progress) {
			show(p)
			if p.Phase == postgres.PhaseDone {
				results = append(results, resultOf(p))
			}
		}
		var errs []error
		for i, name := range models {
			var err error
			switch {
			case c.Rollback:
				err = engine.Rollback(ctx, name, tell)
			case inspect:
				err = engine.Inspect(ctx, name, part, tell)
			default:
				err = engine.Replay(ctx, []string{name}, postgres.ReplayOptions{NoSwap: c.NoSwap, Force: c.Force, Lost: c.Force}, tell)
			}
			var difference *postgres.DifferenceError
			if errors.As(err, &difference) {
				results = append(results, replayed{Name: name, Comparison: &difference.Comparison, Refused: true})
			}
			if last := len(results) - 1; c.NoSwap && err == nil && results[last].Comparison != nil && !results[last].Comparison.Same() {
				errs = append(errs, fmt.Errorf("%s: the rows of the new build differ", name))
			}
			if errs = append(errs, err); err == nil || ctx.Err() == nil && engine.Answers(ctx) {
				continue // what is wrong with one is not wrong with the others
			}
			if left := models[i+1:]; len(left) > 0 {
				errs = append(errs, fmt.Errorf("not tried: %s", strings.Join(left, ", ")))
			}
			break
		}
		err := errors.Join(errs...)
		wait()
		if c.JSON {
			return errors.Join(err, printJSON(map[string]any{"items": results}))
		}
		for _, r := range results {
			if !r.Refused { // which the error says
				fmt.Fprintln(stdout, c.sentence(r))
			}
		}
		return err
	}
	err = c.withEngine(ctx, "wharf-replay", config, func(ctx context.Context, _ *kafka.Client, engine *postgres.Engine) error { return do(ctx, engine) })
	if c.Rollback && errors.Is(err, kafka.ErrNoBroker) {
		return c.withDatabase(ctx, config, err, do)
	}
	return err
}

// giveWay has this process work with what the others leave, so that queries do not wait for a replay. The priority is a
// thread's own on Linux, and new threads inherit it; where it cannot be lowered, nothing is lost.
func giveWay() {
	threads, _ := os.ReadDir("/proc/self/task")
	for _, thread := range threads {
		if id, err := strconv.Atoi(thread.Name()); err == nil {
			_ = syscall.Setpriority(syscall.PRIO_PROCESS, id, 5)
		}
	}
}

// modelsOf checks the names, and puts them in the order in which the read models are listed. No name means all.
func modelsOf(names []string) (models []string, err error) {
	wanted := map[string]bool{}
	for _, name := range names {
		if _, err := projections.Find(projections.All, name); err != nil {
			return nil, usageError(err.Error())
		}
		wanted[name] = true
	}
	for _, m := range projections.All {
		if wanted[m.Name] || len(names) == 0 {
			models = append(models, m.Name)
		}
	}
	return models, nil
}

// part is which part of what happened is asked for.
func (c *replayCmd) part(models []string) (part postgres.Part, err error) {
	if part.From, err = momentOf("--from-position", c.FromPosition); err == nil {
		part.Until, err = momentOf("--until", c.Until)
	}
	if err == nil && part.From != nil && part.Until != nil && part.Until.Before(*part.From) {
		err = usageError("--until is before --from-position")
	}
	if err == nil && c.Key != nil {
		part.Key = *c.Key
		err = checkKey(models, part.Key)
	}
	return part, err
}

// checkKey sees that the key is one of each of the read models.
func checkKey(models []string, key string) error {
	for _, name := range models {
		m, err := projections.Find(projections.All, name)
		if err == nil {
			err = postgres.CheckKey(m, key)
		}
		if err != nil {
			return usageError("--key: " + err.Error())
		}
	}
	return nil
}

func momentOf(flag string, s *string) (*postgres.Moment, error) {
	if s == nil {
		return nil, nil
	}
	m, err := postgres.ParseMoment(*s)
	if err != nil {
		return nil, usageError(flag + ": " + err.Error())
	}
	return &m, nil
}

// replayed is what became of one read model.
type replayed struct {
	Name       string               `json:"name"`
	Build      int64                `json:"build"`
	Events     int64                `json:"events"`
	Table      string               `json:"table"`
	Comparison *postgres.Comparison `json:"comparison,omitempty"`
	Refused    bool                 `json:"refused,omitempty"` // not swapped in, because it differs

	Rows   int64 `json:"rows,omitempty"`   // of a part
	Parked int64 `json:"parked,omitempty"` // events that are missing from it
}

func resultOf(p postgres.Progress) replayed {
	return replayed{p.Model, p.Build, p.Done, p.Table, p.Comparison, false, p.Rows, p.Parked}
}

func (c *replayCmd) sentence(r replayed) string {
	switch {
	case c.Rollback:
		text := fmt.Sprintf("%s is build %d again; the one that was live is kept, and --rollback brings it back. Nothing was compared: `wharf verify %s` does", r.Name, r.Build, r.Name)
		if r.Parked > 0 {
			text += fmt.Sprintf(". Its rows lack %d events that are parked there: `wharf parked list %s` says why", r.Parked, r.Name)
		}
		return text
	case r.Comparison == nil:
		text := fmt.Sprintf("%s: %d rows in the table %s, which is dropped after %s", r.Name, r.Rows, r.Table, c.KeepBuilds)
		if r.Parked > 0 {
			text += fmt.Sprintf("; %d events are missing, because they cannot be applied, or wait for one that cannot", r.Parked)
		}
		return text
	}
	text := fmt.Sprintf("%s is build %d now, made of %d records", r.Name, r.Build, r.Events)
	if c.NoSwap {
		text = fmt.Sprintf("%s: build %d was made of %d records and not swapped in: it is the table %s, which is dropped after %s",
			r.Name, r.Build, r.Events, r.Table, c.KeepBuilds)
	}
	if !r.Comparison.Same() {
		return text + "\nIt differs from the one that was live. " + r.Comparison.String()
	}
	text += fmt.Sprintf("; its %d rows are those of the build that was live (hash %s)", r.Comparison.Rows, r.Comparison.Hash)
	if r.Comparison.Parked > 0 {
		text += fmt.Sprintf(", but for those that waited there for %d parked events", r.Comparison.Parked)
	}
	return text
}

// dryRun says what a replay would read and write.
func (c *replayCmd) dryRun(ctx context.Context, engine *postgres.Engine, models []string) error {
	plans, err := engine.Plan(ctx, models)
	if err != nil {
		return err
	}
	if c.JSON {
		return printJSON(map[string]any{"items": plans})
	}
	for _, p := range plans {
		fmt.Fprintf(stdout, "%s: would read %d events of %s, and write about %d rows (%d KiB with indexes) beside build %d, version %d\n",
			p.Model, p.Events, strings.Join(p.Topics, ", "), p.Rows, p.Bytes>>10, p.Build, p.Version)
	}
	return nil
}

// progress shows how far a replay is: as JSON, bars on a terminal, or lines.
func (c *replayCmd) progress() (show func(postgres.Progress), wait func()) {
	if c.JSON {
		return paced(time.Second, func(p postgres.Progress, rate float64, left time.Duration) {
			_ = json.NewEncoder(os.Stderr).Encode(struct {
				Model          string  `json:"model"`
				Build          int64   `json:"build"`
				Phase          string  `json:"phase"`
				Events         int64   `json:"events"`
				Total          int64   `json:"total"`
				Partitions     int     `json:"partitions"`
				PartitionsDone int     `json:"partitions_done"`
				Rate           float64 `json:"rate"`
				ETA            float64 `json:"eta_seconds"`
			}{p.Model, p.Build, string(p.Phase), p.Done, p.Total, p.Partitions, p.PartitionsDone, float64(int64(rate)), left.Seconds()})
		}), func() {}
	}
	if stderr, err := os.Stderr.Stat(); err == nil && stderr.Mode()&os.ModeCharDevice != 0 {
		return bars()
	}
	return paced(2*time.Second, func(p postgres.Progress, rate float64, left time.Duration) {
		line := fmt.Sprintf("%s: %s", p.Model, p.Phase)
		if p.Total > 0 { // a rollback reads nothing
			line += fmt.Sprintf(", %d of %d events", p.Done, p.Total)
		}
		if p.Phase == postgres.PhaseReading && p.Done > 0 {
			line += fmt.Sprintf(", %d of %d partitions, %.0f events/s, %s left", p.PartitionsDone, p.Partitions, rate, left)
		}
		fmt.Fprintln(os.Stderr, line)
	}), func() {}
}

// paced tells each phase, and how far it is now and then.
func paced(every time.Duration, tell func(p postgres.Progress, rate float64, left time.Duration)) func(postgres.Progress) {
	var last postgres.Progress
	var began, at time.Time
	return func(p postgres.Progress) {
		if p.Model != last.Model {
			began = time.Now()
		}
		if p.Model == last.Model && p.Phase == last.Phase && time.Since(at) < every {
			return
		}
		last, at = p, time.Now()
		rate := float64(p.Done) / max(time.Since(began).Seconds(), 0.001)
		left := time.Duration(0)
		if rate > 0 && p.Phase == postgres.PhaseReading {
			left = time.Duration(float64(p.Total-p.Done) / rate * float64(time.Second)).Round(100 * time.Millisecond)
		}
		tell(p, rate, left)
	}
}

// bars shows the progress on a terminal: a bar for each read model.
func bars() (show func(postgres.Progress), wait func()) {
	type bar struct {
		*mpb.Bar
		state atomic.Value // string
	}
	progress := mpb.New(mpb.WithOutput(os.Stderr), mpb.WithWidth(64))
	all := map[string]*bar{}
	show = func(p postgres.Progress) {
		b := all[p.Model]
		if b == nil {
			b = &bar{}
			b.state.Store("")
			b.Bar = progress.AddBar(max(p.Total, 1),
				mpb.PrependDecorators(decor.Name(p.Model, decor.WCSyncSpaceR)),
				mpb.AppendDecorators(decor.CountersNoUnit("%d of %d"), decor.AverageSpeed(0, " %.0f/s"), decor.Name(" "),
					decor.AverageETA(decor.ET_STYLE_GO), decor.Any(func(decor.Statistics) string { return b.state.Load().(string) })))
			all[p.Model] = b
		}
		b.state.Store(fmt.Sprintf(" %s, %d/%d partitions", p.Phase, p.PartitionsDone, p.Partitions))
		b.SetTotal(max(p.Total, p.Done, 1), p.Phase == postgres.PhaseDone)
		b.SetCurrent(p.Done)
	}
	return show, func() {
		for _, b := range all {
			b.Abort(false) // does nothing to one that is done
		}
		progress.Wait()
	}
}
