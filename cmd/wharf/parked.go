package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"wharf/infra/kafka"
	"wharf/infra/postgres"
	"wharf/projections"
)

type parkedCmd struct {
	List    parkedListCmd    `cmd:"" default:"withargs" help:"List the events that could not be applied, and those that wait for them."`
	Show    parkedShowCmd    `cmd:"" help:"Show one of them with all that is known of it."`
	Retry   parkedRetryCmd   `cmd:"" help:"Apply them in their order, after the program was mended."`
	Discard parkedDiscardCmd `cmd:"" help:"Give one event up: no build of the read model will ever apply it."`
}

type parkedListCmd struct {
	Model string `arg:"" optional:"" help:"Only those of this read model."`
	JSON  bool   `help:"Print them as JSON."`
	storesFlag
}

// Run implements the subcommand.
func (c *parkedListCmd) Run(ctx context.Context) error {
	if c.Model != "" {
		if _, err := modelsOf([]string{c.Model}); err != nil {
			return err
		}
	}
	return c.withEngine(ctx, "wharf-parked", postgres.Config{}, func(ctx context.Context, client *kafka.Client, engine *postgres.Engine) error {
		list, err := engine.Parked(ctx, c.Model)
		if err != nil {
			return err
		}
		discarded, err := engine.DiscardedEvents(ctx, c.Model)
		if err != nil {
			return err
		}
		policies := []projections.PolicyLag{}
		if c.Model == "" {
			if policies, err = (lags{client: client, partitions: engine.Partitions}).Policies(ctx); err != nil {
				return err
			}
			policies = slices.DeleteFunc(policies, func(p projections.PolicyLag) bool { return len(p.Parked) == 0 })
		}
		if c.JSON {
			return printJSON(map[string]any{"items": list, "policies": policies, "discarded": discarded})
		}
		for _, d := range discarded {
			fmt.Fprintf(stdout, "%s: %s was given up at %s\n", d.Model, d.Position, d.At.Format(time.RFC3339))
		}
		if len(list)+len(policies) == 0 {
			fmt.Fprintln(stdout, "nothing is parked")
			return nil
		}
		for _, p := range policies {
			for _, e := range p.Parked {
				if e.Halted != "" {
					fmt.Fprintf(stdout, "policies of %s: all of the partition waits at %s: %s\n", p.Service, e.Position, e.Halted)
				} else {
					fmt.Fprintf(stdout, "policies of %s: stream %s waits at %s, and is tried again\n", p.Service, e.Stream, e.Position)
				}
			}
		}
		if len(list) == 0 {
			return nil
		}
		w := tabwriter.NewWriter(stdout, 0, 0, 2, ' ', 0)
		fmt.Fprintln(w, "READ MODEL\tBUILD\tPOSITION\tTYPE\tSTREAM\tSINCE\tWHY")
		for _, p := range list {
			why, _, _ := strings.Cut(p.Error, "\n")
			if why == "" {
				why = "waits for one before it"
			}
			fmt.Fprintf(w, "%s\t%d (%s)\t%s\t%s\t%s\t%s\t%s\n", p.Model, p.Build, p.State, p.Position, p.Name, p.Stream,
				p.ParkedAt.Format(time.RFC3339), why)
		}
		return w.Flush()
	})
}

// parkedEventArgs name one parked event.
type parkedEventArgs struct {
	Model    string `arg:"" help:"The read model."`
	Position string `arg:"" help:"The event's position, as the list shows it."`
	storesFlag
}

func (a parkedEventArgs) check() error {
	_, err := modelsOf([]string{a.Model})
	if err != nil {
		return err
	}
	if m, err := postgres.ParseMoment(a.Position); err != nil || m.Position.Topic == "" {
		return usageError(fmt.Sprintf("%q is no position such as orders.events/3/17", a.Position))
	}
	return nil
}

type parkedShowCmd struct {
	parkedEventArgs
	JSON bool `help:"Print it as JSON, which is so in any case."`
}

// Run implements the subcommand.
func (c *parkedShowCmd) Run(ctx context.Context) error {
	if err := c.check(); err != nil {
		return err
	}
	return c.withEngine(ctx, "wharf-parked", postgres.Config{}, func(ctx context.Context, _ *kafka.Client, engine *postgres.Engine) error {
		list, err := engine.Parked(ctx, c.Model)
		if err != nil {
			return err
		}
		for _, p := range list {
			if p.Position == c.Position {
				return printJSON(p)
			}
		}
		return postgres.ErrNotParked
	})
}

type parkedRetryCmd struct {
	Model string `arg:"" help:"The read model."`
	Key   string `help:"Only the events with this key: a stream's id, or the text of a row's key."`
	JSON  bool   `help:"Print the result as JSON."`
	storesFlag
}

// Run implements the subcommand.
func (c *parkedRetryCmd) Run(ctx context.Context) error {
	if _, err := modelsOf([]string{c.Model}); err != nil {
		return err
	}
	return c.withEngine(ctx, "wharf-parked", postgres.Config{}, func(ctx context.Context, _ *kafka.Client, engine *postgres.Engine) error {
		done, err := engine.RetryParked(ctx, c.Model, c.Key)
		if err != nil {
			return err
		}
		if c.JSON {
			err = printJSON(done)
		} else {
			fmt.Fprintf(stdout, "%s: %d events were applied, %d wait still\n", c.Model, done.Applied, done.Waiting)
			if done.Previous > 0 {
				fmt.Fprintf(stdout, "%d wait in the previous build, and would be missing after a rollback\n", done.Previous)
			}
		}
		if err == nil && done.Applied == 0 && done.Waiting > 0 {
			err = errors.New("nothing was applied: wharf parked list says what waits, and why")
		}
		return err
	})
}

type parkedDiscardCmd struct {
	parkedEventArgs
	JSON bool `help:"Print the result as JSON."`
}

// Run implements the subcommand.
func (c *parkedDiscardCmd) Run(ctx context.Context) error {
	if err := c.check(); err != nil {
		return err
	}
	return c.withEngine(ctx, "wharf-parked", postgres.Config{}, func(ctx context.Context, _ *kafka.Client, engine *postgres.Engine) error {
		if err := engine.DiscardParked(ctx, c.Model, c.Position); err != nil {
			return err
		}
		if c.JSON {
			return printJSON(map[string]string{"model": c.Model, "position": c.Position})
		}
		fmt.Fprintf(stdout, "%s: %s is given up; wharf parked retry %s applies what waited for it\n", c.Model, c.Position, c.Model)
		return nil
	})
}
