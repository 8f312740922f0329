package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"wharf/infra/journal"
	"wharf/infra/postgres"
	"wharf/projections"
)

type projectCmd struct {
	Model string  `arg:"" help:"The read model."`
	Key   string  `required:"" help:"The row: a stream's id, or the columns of the row's key with slashes between."`
	AsOf  *string `placeholder:"WHEN" help:"A time (RFC 3339), or a position as an order's history shows it; now if not given."`
	JSON  bool    `help:"Print it as JSON."`
	storesFlag
}

// Run implements the subcommand. It folds the log; the database, if there is one, is asked for what was given up.
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
	named := c.DatabaseURL != ""
	if len(c.KafkaBrokers) == 0 {
		if err := c.resolve(); err != nil {
			return err
		}
	}
	client, partitions, err := c.connect(ctx, "wharf-project")
	if err != nil {
		return err
	}
	defer client.Close()
	ids, err := client.TopicIDs(ctx, projections.Topics)
	if err != nil {
		return err
	}
	givenUp, err := c.givenUp(ctx, ids)
	if err != nil && named {
		return err
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "events that were given up, if there are any, count here: %v\n", err)
	}
	engine := postgres.New(nil, postgres.Config{
		Source: func(topic string) journal.Reader { return client.Reader(topic) }, Partitions: partitions,
	})
	return c.whileKafka(ctx, client, func(ctx context.Context) error {
		s, err := engine.AsOf(ctx, c.Model, c.Key, at, givenUp)
		if err != nil {
			return err
		}
		return c.print(s)
	})
}

// givenUp asks the database for the events that nobody is to apply. Without it, or while it is away, a row can be folded
// all the same.
func (c *projectCmd) givenUp(ctx context.Context, ids map[string]string) ([]postgres.Discarded, error) {
	if c.DatabaseURL == "" {
		return nil, errors.New("no --database-url")
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	pool, err := postgres.Open(ctx, c.DatabaseURL)
	if err != nil {
		return nil, err
	}
	defer pool.Close()
	return postgres.New(pool, postgres.Config{TopicIDs: ids}).DiscardedEvents(ctx, c.Model)
}

func (c *projectCmd) print(s postgres.Snapshot) error {
	if c.JSON {
		return printJSON(map[string]any{"items": s.Rows})
	}
	e := json.NewEncoder(stdout)
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
