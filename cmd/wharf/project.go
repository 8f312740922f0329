package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"time"

	"wharf/infra/journal"
	"wharf/infra/kafka"
	"wharf/infra/postgres"
)

type projectCmd struct {
	Model string  `arg:"" help:"The read model."`
	Key   string  `required:"" help:"The row: a stream's id, or the columns of the row's key with slashes between."`
	AsOf  *string `placeholder:"WHEN" help:"A time (RFC 3339), or a position as an order's history shows it; now if not given."`
	JSON  bool    `help:"Print it as JSON."`
	storesFlag
}

// Run implements the subcommand. It folds the log, and needs no database but to know which events were given up.
func (c *projectCmd) Run(ctx context.Context) error {
	if _, err := modelsOf([]string{c.Model}); err != nil {
		return err
	}
	if err := checkKey([]string{c.Model}, c.Key); err != nil {
		return err
	}
	at, err := momentOf("--as-of", c.AsOf)
	if err != nil {
		return err
	}
	fold := func(ctx context.Context, _ *kafka.Client, engine *postgres.Engine) error {
		s, err := engine.AsOf(ctx, c.Model, c.Key, at)
		if err != nil {
			return err
		}
		return c.print(s)
	}
	if c.DatabaseURL != "" || len(c.KafkaBrokers) == 0 {
		return c.withEngine(ctx, "wharf-project", time.Hour, fold)
	}
	client, partitions, err := c.connect(ctx, "wharf-project")
	if err != nil {
		return err
	}
	defer client.Close()
	engine := postgres.New(nil, postgres.Config{
		Source: func(topic string) journal.Reader { return client.Reader(topic) }, Partitions: partitions,
	})
	return c.whileKafka(ctx, client, func(ctx context.Context) error { return fold(ctx, client, engine) })
}

func (c *projectCmd) print(s postgres.Snapshot) error {
	if c.JSON {
		return printJSON(map[string]any{"items": s.Rows})
	}
	e := json.NewEncoder(os.Stdout)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	for _, row := range s.Rows {
		if err := e.Encode(row); err != nil {
			return err
		}
	}
	fmt.Fprintf(os.Stderr, "%d rows, made of %d events\n", len(s.Rows), s.Events)
	return nil
}
