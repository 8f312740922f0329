package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"golang.org/x/sync/errgroup"

	"wharf/commands"
	inventoryapi "wharf/commands/inventory"
	ordersapi "wharf/commands/orders"
	paymentsapi "wharf/commands/payments"
	shippingapi "wharf/commands/shipping"
	"wharf/domain"
	"wharf/infra/journal"
	"wharf/infra/kafka"
	"wharf/infra/policies"
	"wharf/infra/postgres"
	"wharf/projections"
)

type queryCmd struct {
	brokersFlag
	databaseFlag
	partitionsFlag
	addrFlag
}

// Run implements the subcommand.
func (c *queryCmd) Run(ctx context.Context) error {
	collectLess(shopGarbage, readSideMemory())
	l, err := listen(c.Addr)
	if err != nil {
		return err
	}
	client, err := kafka.Connect(ctx, kafka.Config{Brokers: c.KafkaBrokers, ClientID: "wharf-query"})
	if err != nil {
		return err
	}
	defer client.Close()
	q, err := queryPart(ctx, client, c.DatabaseURL, c.Partitions)
	if err != nil {
		return err
	}
	return serve(ctx, l, client, q)
}

// queryPart serves the read models. It can read their views and do nothing else.
func queryPart(ctx context.Context, client *kafka.Client, url string, partitions int) (part, error) {
	ids, err := client.TopicIDs(ctx, projections.Topics)
	if err != nil {
		return part{}, err
	}
	pool, err := postgres.OpenQuery(ctx, url)
	if err != nil {
		return part{}, err
	}
	positions := postgres.NewPositions(pool)
	positions.TopicIDs = ids
	return part{
		register: func(api huma.API) {
			projections.Register(api, projections.Reads{DB: pool, Positions: positions, Lags: lags{client, partitions, ids}})
		},
		run: func(ctx context.Context) error {
			<-ctx.Done()
			pool.Close()
			return nil
		},
		ready: func() error {
			ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
			defer cancel()
			return projections.Ready(ctx, pool)
		},
	}, nil
}

// lags is what Kafka knows of how far everybody is. It implements projections.Lags.
type lags struct {
	client     *kafka.Client
	partitions int
	ids        map[string]string // of the topics
}

// TopicIDs implements projections.Lags.
func (l lags) TopicIDs() map[string]string { return l.ids }

func (l lags) Ends(ctx context.Context, topics []string) (map[string]map[int32]int64, error) {
	var mu sync.Mutex
	ends := map[string]map[int32]int64{}
	group, ctx := errgroup.WithContext(ctx)
	for _, topic := range topics {
		ends[topic] = map[int32]int64{}
		for p := range int32(l.partitions) {
			group.Go(func() error {
				end, err := l.client.Reader(topic).End(ctx, p)
				if err != nil {
					return kafkaAway(err)
				}
				mu.Lock()
				defer mu.Unlock()
				ends[topic][p] = end
				return nil
			})
		}
	}
	return ends, group.Wait()
}

func (l lags) Oldest(ctx context.Context, topic string, partition int32, offset int64) (at time.Time, found bool, err error) {
	errFound := errors.New("found")
	err = l.client.Reader(topic).Read(ctx, partition, offset, func(b journal.Batch) error {
		if len(b.Records) > 0 {
			at, found = b.Records[0].Time, true
		}
		return errFound
	})
	if errors.Is(err, errFound) {
		return at, found, nil
	}
	return at, false, kafkaAway(err)
}

func (l lags) Policies(ctx context.Context) ([]projections.PolicyLag, error) {
	all := make([]projections.PolicyLag, len(services))
	group, ctx := errgroup.WithContext(ctx)
	for i, service := range services {
		group.Go(func() error {
			lag, parked, err := l.client.GroupLag(ctx, policies.Group(service), publicTopics(sources[service]...))
			if err != nil {
				return kafkaAway(err)
			}
			all[i] = projections.PolicyLag{Service: service, Lag: lag}
			for _, p := range parked {
				at := domain.Position{Topic: p.Topic, Partition: p.Partition, Seq: p.Seq}
				all[i].Parked = append(all[i].Parked, projections.ParkedPolicy{Position: at.String(), Stream: p.Target, Halted: p.Reason})
			}
			return nil
		})
	}
	return all, group.Wait()
}

// kafkaAway makes a failure to ask Kafka one that passes: these questions cannot be wrong.
func kafkaAway(err error) error { return fmt.Errorf("%w: %w", commands.ErrNotReady, err) }

// allRoutes registers every route of the shop, to be documented: none of them can be called.
func allRoutes(api huma.API) {
	ordersapi.Register(api, ordersapi.Service{})
	inventoryapi.Register(api, inventoryapi.Service{})
	paymentsapi.Register(api, paymentsapi.Service{})
	shippingapi.Register(api, shippingapi.Service{})
	projections.Register(api, projections.Reads{})
}
