package main

import (
	"context"
	"errors"
	"fmt"

	"wharf/infra/kafka"
	"wharf/infra/postgres"
)

type verifyCmd struct {
	Models []string `arg:"" optional:"" help:"Read models to verify; all if none is named."`
	JSON   bool     `help:"Print the results as JSON."`
	storesFlag
}

// Run implements the subcommand.
func (c *verifyCmd) Run(ctx context.Context) error {
	models, err := modelsOf(c.Models)
	if err != nil {
		return err
	}
	return c.withEngine(ctx, "wharf-verify", postgres.Config{}, func(ctx context.Context, _ *kafka.Client, engine *postgres.Engine) error {
		show, wait := (&replayCmd{JSON: c.JSON}).progress()
		results := []postgres.Comparison{}
		err := engine.Verify(ctx, models, show, func(r postgres.Comparison) { results = append(results, r) })
		wait()
		if c.JSON {
			err = errors.Join(err, printJSON(map[string]any{"items": results}))
		}
		wrong := 0
		for _, r := range results {
			if !c.JSON {
				fmt.Fprintln(stdout, r.String())
			}
			if !r.Same() || r.Halted != "" || r.Unread != "" {
				wrong++
			}
		}
		if err == nil && wrong > 0 {
			err = fmt.Errorf("%d of %d read models are not what the log says, or have halted, or are not what queries read", wrong, len(results))
		}
		return err
	})
}
