package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
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
	projectionFlags
}

// deadProjector is how long the tasks of a projector that has died stand still: the least that Kafka allows. Should it live, nothing is
// written twice.
const deadProjector = 6 * time.Second

// projectionFlags say how read models are kept.
type projectionFlags struct {
	VerifyEvery time.Duration `env:"WHARF_VERIFY_EVERY" default:"6h" help:"How often all read models are compared with the fold of the log in the background; 0 for never."`
	VerifyRate  int           `env:"WHARF_VERIFY_RATE" default:"20000" help:"Events a second that such a comparison reads at most."`
	keepFlag
}

// config is the engine's, checked.
func (f projectionFlags) config(partitions int) (c postgres.Config, err error) {
	if err := positive("--keep-builds", f.KeepBuilds); err != nil {
		return c, err
	}
	if f.VerifyEvery < 0 || f.VerifyRate < 1 {
		return c, usageError("--verify-every must not be negative, --verify-rate must be above 0")
	}
	return postgres.Config{Partitions: partitions, Keep: f.KeepBuilds, Verify: f.VerifyEvery, Pace: f.VerifyRate}, nil
}

// Run implements the subcommand.
func (c *projectorCmd) Run(ctx context.Context) error {
	collectLess(shopGarbage, readSideMemory())
	config, err := c.config(c.Partitions)
	if err != nil {
		return err
	}
	l, err := listen(c.Addr)
	if err != nil {
		return err
	}
	client, err := kafka.Connect(ctx, kafka.Config{
		Brokers: c.KafkaBrokers,
		// A group shares partitions out in the order of its members' names: so all groups give this process the same ones, which it
		// reads once.
		ClientID:       "wharf-projector-" + uuid.NewString()[:8],
		SessionTimeout: deadProjector,
	})
	if err != nil {
		return err
	}
	defer client.Close()
	p, err := projectorPart(ctx, client, c.DatabaseURL, config)
	if err != nil {
		return err
	}
	return serve(ctx, l, client, p)
}

// projectorPart runs all read models in the partitions that their groups give it. The groups only share the work out;
// how far each task is stands in the database. It refuses to run on topics that could lose events.
func projectorPart(ctx context.Context, client *kafka.Client, url string, config postgres.Config) (part, error) {
	engine, closePool, err := openEngine(ctx, client, url, config)
	if err != nil {
		return part{}, err
	}
	if err := engine.Setup(ctx); err != nil {
		closePool()
		return part{}, err
	}
	return part{
		ready: engine.Ready,
		run: func(ctx context.Context) error {
			defer closePool()
			specs := make([]kafka.TopicSpec, len(projections.Topics))
			for i, topic := range projections.Topics {
				specs[i] = kafka.TopicSpec{Name: topic, Partitions: int32(config.Partitions)}
			}
			if err := client.CheckTopics(ctx, specs); err != nil {
				return fmt.Errorf("check the topics of the projector: %w", err)
			}
			group, ctx := errgroup.WithContext(ctx)
			group.Go(func() error { return watchTopics(ctx, client, specs) })
			group.Go(func() error { return engine.Run(ctx, client.RunGroup) })
			return group.Wait()
		},
	}, nil
}

// openEngine is the projection engine on the client's topics.
func openEngine(ctx context.Context, client *kafka.Client, url string, config postgres.Config) (*postgres.Engine, func(), error) {
	if url == "" {
		return nil, nil, errors.New("no database URL")
	}
	ids, err := client.TopicIDs(ctx, projections.Topics)
	if err != nil {
		return nil, nil, err
	}
	config.TopicIDs = ids
	pool, err := postgres.Open(ctx, url)
	if err != nil {
		return nil, nil, fmt.Errorf("open the read models: %w", err)
	}
	config.Source = func(topic string) journal.Reader { return client.Reader(topic) }
	return postgres.New(pool, config), pool.Close, nil
}
