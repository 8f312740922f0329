package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"sync/atomic"
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
	JSON   bool     `help:"Print the new builds as JSON."`
	storesFlag
}

// Run implements the subcommand.
func (c *replayCmd) Run(ctx context.Context) error {
	if c.All == (len(c.Models) > 0) {
		return usageError("name read models, or say --all")
	}
	if c.All {
		for _, m := range projections.All {
			c.Models = append(c.Models, m.Name)
		}
	}
	models := c.Models
	c.Models = nil
	for _, m := range projections.All {
		if slices.Contains(models, m.Name) {
			c.Models = append(c.Models, m.Name)
			models = slices.DeleteFunc(models, func(name string) bool { return name == m.Name })
		}
	}
	if len(models) > 0 {
		return usageError(fmt.Sprintf("there is no read model %q; wharf projections lists them", models[0]))
	}
	if err := c.resolve(); err != nil {
		return err
	}
	client, err := kafka.Connect(ctx, kafka.Config{Brokers: c.KafkaBrokers, ClientID: "wharf-replay"})
	if err != nil {
		return err
	}
	defer client.Close()
	partitions, err := client.Partitions(ctx, projections.OrdersTopic)
	if err != nil {
		return err
	}
	engine, closePool, err := openEngine(ctx, client, c.DatabaseURL, partitions)
	if err != nil {
		return err
	}
	defer closePool()

	show, wait := lines(), func() {}
	if stderr, err := os.Stderr.Stat(); err == nil && stderr.Mode()&os.ModeCharDevice != 0 {
		show, wait = bars()
	}
	fresh := []newBuild{}
	err = engine.Replay(ctx, c.Models, postgres.ReplayOptions{}, func(p postgres.Progress) {
		show(p)
		if p.Phase == postgres.PhaseDone {
			fresh = append(fresh, newBuild{p.Model, p.Build, p.Done})
		}
	})
	wait()
	if err != nil {
		return err
	}
	if c.JSON {
		return printJSON(map[string]any{"items": fresh})
	}
	for _, b := range fresh {
		fmt.Printf("%s is build %d now, made of %d events\n", b.Name, b.Build, b.Events)
	}
	return nil
}

type newBuild struct {
	Name   string `json:"name"`
	Build  int64  `json:"build"`
	Events int64  `json:"events"`
}

// lines tells the progress to a log: a line for each phase, and one now and then.
func lines() func(postgres.Progress) {
	var last postgres.Progress
	var at time.Time
	return func(p postgres.Progress) {
		if p.Model == last.Model && p.Phase == last.Phase && time.Since(at) < 2*time.Second {
			return
		}
		last, at = p, time.Now()
		fmt.Fprintf(os.Stderr, "%s: %s, %d of %d events\n", p.Model, p.Phase, p.Done, p.Total)
	}
}

// bars shows the progress on a terminal: a bar for each read model.
func bars() (show func(postgres.Progress), wait func()) {
	type bar struct {
		*mpb.Bar
		phase atomic.Value // string
	}
	progress := mpb.New(mpb.WithOutput(os.Stderr), mpb.WithWidth(64))
	all := map[string]*bar{}
	show = func(p postgres.Progress) {
		b := all[p.Model]
		if b == nil {
			b = &bar{}
			b.phase.Store("")
			b.Bar = progress.AddBar(max(p.Total, 1),
				mpb.PrependDecorators(decor.Name(p.Model, decor.WCSyncSpaceR)),
				mpb.AppendDecorators(decor.CountersNoUnit("%d of %d"), decor.Any(func(decor.Statistics) string {
					return " " + b.phase.Load().(string)
				})))
			all[p.Model] = b
		}
		b.phase.Store(string(p.Phase))
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
