package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"

	"wharf/infra/embedded"
	"wharf/infra/kafka"
	"wharf/infra/load"
	"wharf/infra/provider"
)

type demoCmd struct {
	Addr              string   `env:"WHARF_ADDR" default:"127.0.0.1:8080" help:"Address to serve HTTP at. All other ports are chosen free."`
	DataDir           string   `name:"data-dir" env:"WHARF_DATA_DIR" default:".wharf" help:"Where everything is kept. A restart goes on where it was."`
	Customers         int      `default:"0" help:"Made-up customers that keep shopping; 0 for none."`
	KafkaBrokers      []string `name:"kafka-brokers" env:"WHARF_KAFKA_BROKERS" placeholder:"HOST:PORT" help:"Use this Kafka instead of the embedded broker. Topics are created there."`
	DatabaseURL       string   `name:"database-url" env:"WHARF_DATABASE_URL" placeholder:"URL" help:"Use this Postgres instead of the embedded one."`
	ReplicationFactor int      `env:"WHARF_REPLICATION_FACTOR" default:"1" help:"Replicas of every partition, with --kafka-brokers."`
	partitionsFlag
	deadlineFlag
	projectionFlags
	faultFlags
}

// Run implements the subcommand.
func (c *demoCmd) Run(ctx context.Context) (err error) {
	if err := positive("--order-deadline", c.OrderDeadline); err != nil {
		return err
	}
	if err := checkAddr(c.Addr); err != nil {
		return err
	}
	if c.Customers < 0 || c.ReplicationFactor < 1 {
		return usageError("--customers must not be negative, --replication-factor must be above 0")
	}
	config, err := c.config(c.Partitions)
	if err != nil {
		return err
	}
	faults, err := c.faults()
	if err != nil {
		return err
	}
	collectLess(shopGarbage, 3<<29) // 1.5 GiB, for eight programs in one process
	began := time.Now()
	owner, err := embedded.Lock(c.DataDir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, owner.Release()) }()
	l, err := listen(c.Addr)
	if err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "Starting in %s. (The first start on a machine fetches Postgres, which takes a moment.)\n", c.DataDir)

	// What is real elsewhere is embedded here, unless it was named.
	at := embedded.Runtime{Addr: l.Addr().String(), Brokers: c.KafkaBrokers, DatabaseURL: c.DatabaseURL}
	starting, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	var broker *embedded.Broker
	var postgres *embedded.Postgres
	begin, starting := errgroup.WithContext(starting)
	if len(c.KafkaBrokers) == 0 {
		c.ReplicationFactor = 1
		begin.Go(func() (err error) {
			broker, err = embedded.StartBroker(starting, c.DataDir, slog.Default())
			return err
		})
	}
	if c.DatabaseURL == "" {
		begin.Go(func() (err error) {
			postgres, err = embedded.StartPostgres(starting, c.DataDir, slog.Default())
			return err
		})
	}
	err = begin.Wait()
	if broker != nil {
		at.Brokers = broker.Addrs()
		defer func() { err = errors.Join(err, broker.Close()) }()
	}
	if postgres != nil {
		at.DatabaseURL = postgres.URL()
		defer func() { err = errors.Join(err, postgres.Stop()) }()
	}
	if err != nil {
		return err
	}
	client, err := kafka.Connect(ctx, kafka.Config{Brokers: at.Brokers, ClientID: "wharf-demo"})
	if err != nil {
		return err
	}
	defer client.Close()
	specs := topicSpecs(c.Partitions, c.ReplicationFactor)
	if err := client.CreateTopics(ctx, specs); err != nil {
		return err
	}
	if err := client.CheckTopics(ctx, specs); err != nil {
		return err
	}

	providerListener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return fmt.Errorf("listen for the payment provider: %w", err)
	}
	at.Provider = "http://" + providerListener.Addr().String()
	ask := provider.NewClient(at.Provider, 5*time.Second)
	defer ask.Close()
	projector, err := projectorPart(ctx, client, at.DatabaseURL, config)
	if err != nil {
		return err
	}
	query, err := queryPart(ctx, client, at.DatabaseURL, c.Partitions)
	if err != nil {
		return err
	}
	if err := owner.Publish(at); err != nil {
		return err
	}
	parts := []part{
		ordersPart(client, c.Partitions, c.OrderDeadline), inventoryPart(client, c.Partitions),
		paymentsPart(client, c.Partitions, ask), shippingPart(client, c.Partitions), projector, query,
		{run: func(ctx context.Context) error {
			return serveProvider(ctx, providerListener,
				provider.Options{Faults: faults, File: filepath.Join(c.DataDir, "provider.jsonl")})
		}},
	}
	if postgres != nil {
		parts = append(parts, part{run: func(life context.Context) error { return keepUp(life, &postgres, c.DataDir) }})
	}
	parts = append(parts, part{run: func(life context.Context) error {
		for _, p := range parts[:len(parts)-1] {
			for p.ready != nil && p.ready() != nil {
				if !sleep(life, 20*time.Millisecond) {
					return nil
				}
			}
		}
		welcome(at.Addr, c.DataDir, time.Since(began))
		if c.Customers == 0 {
			return nil
		}
		shopping, cancel := context.WithCancel(life)
		defer cancel()
		context.AfterFunc(ctx, cancel) // before the shop closes
		return load.Customers(shopping, "http://"+at.Addr, c.Customers, slog.Default())
	}})
	return serve(ctx, l, client, parts...)
}

// keepUp starts the embedded Postgres again when it has ended by itself, where its clients look for it. Meanwhile commands go on,
// which need no database. It gives up on one that does not live, or has lost its cluster.
func keepUp(life context.Context, postgres **embedded.Postgres, dir string) error {
	const short, most = 2 * time.Second, 5 // lives, one after the other
	for lives := 1; ; lives++ {
		began := time.Now()
		select {
		case <-life.Done():
			return nil
		case <-(*postgres).Done():
		}
		if time.Since(began) > short {
			lives = 0
		}
		if lives == most {
			return fmt.Errorf("the embedded Postgres ends again and again: postgres.log in %s says why", dir)
		}
		slog.Warn("the embedded Postgres has ended, and is started again: postgres.log.old in " + dir + " says why it ended")
		again, err := embedded.StartPostgres(life, dir, slog.Default(), embedded.Port((*postgres).Port()))
		if life.Err() != nil && err != nil {
			return nil
		}
		if err != nil {
			return err
		}
		before := (*postgres).URL()
		if *postgres = again; again.URL() != before {
			return errors.New("the cluster of the embedded Postgres was gone: start the demo again, and it builds the read models anew")
		}
		slog.Info("the embedded Postgres takes connections again")
	}
}

// welcome says what to try next.
func welcome(addr, dir string, took time.Duration) {
	url := "http://" + addr
	suffix := ""
	if dir != ".wharf" {
		suffix = " --data-dir " + dir
	}
	fmt.Fprintf(os.Stderr, `
The shop is open at %[1]s (after %[2]s). Try:

  curl -X POST %[1]s/stock/85123A/receive -H 'Content-Type: application/json' -d '{"quantity": 100}'
  curl -X POST %[1]s/orders -H 'Content-Type: application/json' -H 'Idempotency-Key: my-first' \
       -d '{"customer": "17850", "lines": [{"sku": "85123A", "quantity": 6, "unit_price": {"amount": 255, "currency": "GBP"}}]}'
  curl %[1]s/orders
  curl %[1]s/openapi.json

In another terminal:

  go run ./cmd/wharf load --url %[1]s        # some customers
  go run ./cmd/wharf projections%[3]s        # where the read models stand
  go run ./cmd/wharf replay --all%[3]s       # build them anew from the log, while queries go on
  go run ./cmd/wharf verify%[3]s             # compare them with the fold of the log, row by row
  go run ./cmd/wharf audit --url %[1]s       # check the invariants

Ctrl-C stops it; the next start goes on from here.

`, url, took.Round(100*time.Millisecond), suffix)
}
