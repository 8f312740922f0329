package main

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sync/errgroup"

	"wharf/infra/journal"
	"wharf/infra/kafka"
	"wharf/infra/postgres"
	"wharf/projections"
)

type projectorCmd struct {
	brokersFlag
	databaseFlag
	partitionsFlag
	addrFlag
}

// Run implements the subcommand.
func (c *projectorCmd) Run(ctx context.Context) error {
	l, err := listen(c.Addr)
	if err != nil {
		return err
	}
	client, err := kafka.Connect(ctx, kafka.Config{Brokers: c.KafkaBrokers, ClientID: "wharf-projector"})
	if err != nil {
		return err
	}
	defer client.Close()
	p, err := projectorPart(ctx, client, c.DatabaseURL, c.Partitions)
	if err != nil {
		return err
	}
	return serve(ctx, l, p)
}

// projectorPart runs all read models in the partitions that the group gives it. The group only shares the work out;
// how far each task is stands in the database. It refuses to run on topics that could lose events.
func projectorPart(ctx context.Context, client *kafka.Client, url string, partitions int) (part, error) {
	engine, closePool, err := openEngine(ctx, client, url, partitions)
	if err != nil {
		return part{}, err
	}
	if err := engine.Setup(ctx); err != nil {
		closePool()
		return part{}, err
	}
	return part{
		run: func(ctx context.Context) error {
			defer closePool()
			specs := make([]kafka.TopicSpec, len(projections.Topics))
			for i, topic := range projections.Topics {
				specs[i] = kafka.TopicSpec{Name: topic, Partitions: int32(partitions)}
			}
			if err := client.CheckTopics(ctx, specs); err != nil {
				return fmt.Errorf("check the topics of the projector: %w", err)
			}
			group, ctx := errgroup.WithContext(ctx)
			group.Go(func() error { return engine.Run(ctx) })
			group.Go(func() error { return watchTopics(ctx, client, specs) })
			group.Go(func() error {
				return client.RunGroup(ctx, "projector", projections.Topics, func(ctx context.Context, p int32) {
					_ = engine.RunPartition(ctx, p) // which fails for no partition that there is
				})
			})
			return group.Wait()
		},
	}, nil
}

func openEngine(ctx context.Context, client *kafka.Client, url string, partitions int) (*postgres.Engine, func(), error) {
	if url == "" {
		return nil, nil, errors.New("no database URL")
	}
	pool, err := postgres.Open(ctx, url)
	if err != nil {
		return nil, nil, fmt.Errorf("open the read models: %w", err)
	}
	engine := postgres.New(pool, postgres.Config{
		Source: func(topic string) journal.Reader { return client.Reader(topic) }, Partitions: partitions,
	})
	return engine, pool.Close, nil
}
