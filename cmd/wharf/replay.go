package main

import (
	"context"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

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

	bars := newBars()
	err = engine.Replay(ctx, c.Models, bars.show)
	bars.wait(err)
	if err != nil {
		return err
	}
	if c.JSON {
		return printJSON(map[string]any{"items": bars.done})
	}
	for _, b := range bars.done {
		fmt.Printf("%s is build %d now, made of %d events\n", b.Name, b.Build, b.Records)
	}
	return nil
}

// bars shows the progress of one read model after the other on standard error.
type bars struct {
	mu       sync.Mutex
	progress *mpb.Progress
	bar      *mpb.Bar
	model    string
	phase    atomic.Value // string
	done     []newBuild
}

type newBuild struct {
	Name    string `json:"name"`
	Build   int64  `json:"build"`
	Records int64  `json:"records"`
}

func newBars() *bars {
	return &bars{progress: mpb.New(mpb.WithOutput(os.Stderr), mpb.WithWidth(40), mpb.WithAutoRefresh()), done: []newBuild{}}
}

func (b *bars) show(p postgres.Progress) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.phase.Store(string(p.Phase))
	if b.model != p.Model {
		b.model = p.Model
		b.bar = b.progress.AddBar(max(p.Total, 1),
			mpb.PrependDecorators(decor.Name(p.Model, decor.WCSyncSpaceR)),
			mpb.AppendDecorators(decor.CountersNoUnit("%d of %d"), decor.Any(func(decor.Statistics) string {
				return " " + b.phase.Load().(string) // without the lock: show holds it while it waits for the bar
			})))
	}
	b.bar.SetTotal(max(p.Total, p.Done, 1), false)
	b.bar.SetCurrent(p.Done)
	if p.Phase == postgres.PhaseDone {
		b.bar.SetTotal(max(p.Done, 1), true)
		b.done = append(b.done, newBuild{p.Model, p.Build, p.Done})
	}
}

func (b *bars) wait(err error) {
	if err != nil && b.bar != nil {
		b.bar.Abort(false)
	}
	b.progress.Wait()
}
