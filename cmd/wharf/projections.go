package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"wharf/infra/embedded"
	"wharf/infra/journal"
	"wharf/infra/kafka"
	"wharf/infra/postgres"
	"wharf/projections"
)

// storesFlag names Kafka and Postgres, or a demo that has both.
type storesFlag struct {
	KafkaBrokers brokers `name:"kafka-brokers" env:"WHARF_KAFKA_BROKERS" placeholder:"HOST:PORT" help:"Kafka's brokers; those of the running demo if not given."`
	DatabaseURL  string  `name:"database-url" env:"WHARF_DATABASE_URL" placeholder:"URL" help:"The Postgres of the read models; that of the running demo if not given."`
	demoFlag
}

// resolve finds what was not named in the running demo.
func (f *storesFlag) resolve() error {
	if len(f.KafkaBrokers) > 0 && f.DatabaseURL != "" {
		return nil
	}
	demo, err := embedded.ReadRuntime(f.DataDir)
	switch {
	case err == nil:
	case f.DatabaseURL != "":
		return fmt.Errorf("--kafka-brokers is missing: %w", err)
	case len(f.KafkaBrokers) > 0:
		return fmt.Errorf("--database-url is missing: %w", err)
	default:
		return err
	}
	if len(f.KafkaBrokers) == 0 {
		f.KafkaBrokers = demo.Brokers
	}
	if f.DatabaseURL == "" {
		f.DatabaseURL = demo.DatabaseURL
	}
	return nil
}

// connect is a client of the brokers, which resolve has found, and how many partitions the topics have.
func (f *storesFlag) connect(ctx context.Context, name string) (client *kafka.Client, partitions int, err error) {
	if client, err = kafka.Connect(ctx, kafka.Config{Brokers: f.KafkaBrokers, ClientID: name}); err != nil {
		return nil, 0, err
	}
	if partitions, err = client.Partitions(ctx, projections.OrdersTopic); err != nil {
		return nil, 0, errors.Join(err, client.Close())
	}
	return client, partitions, nil
}

// kafkaPatience is how long an operation goes on while the brokers do not answer.
const kafkaPatience = 30 * time.Second

// whileKafka calls do with a context that ends when the brokers have not answered for too long: readers wait for them for
// ever, which is right for a service and not for somebody at a terminal.
func (f *storesFlag) whileKafka(ctx context.Context, client *kafka.Client, do func(context.Context) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	gone := fmt.Errorf("the brokers at %s have not answered for %s, and what was done until then stays: run it again when they do",
		strings.Join(f.KafkaBrokers, ","), kafkaPatience)
	go func() {
		for answered := time.Now(); ctx.Err() == nil; time.Sleep(time.Second) {
			asking, enough := context.WithTimeout(ctx, 5*time.Second)
			_, err := client.Reader(projections.OrdersTopic).End(asking, 0)
			enough()
			if err == nil {
				answered = time.Now()
			} else if time.Since(answered) > kafkaPatience {
				cancel(gone)
			}
		}
	}()
	err := do(ctx)
	if err != nil && context.Cause(ctx) == gone {
		return gone
	}
	return err
}

// withEngine calls do with the projection engine of these stores.
func (f *storesFlag) withEngine(
	ctx context.Context, name string, c postgres.Config, do func(context.Context, *kafka.Client, *postgres.Engine) error,
) error {
	if err := f.resolve(); err != nil {
		return err
	}
	client, partitions, err := f.connect(ctx, name)
	if err != nil {
		return err
	}
	defer client.Close()
	c.Partitions = partitions
	opening, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	engine, closePool, err := openEngine(opening, client, f.DatabaseURL, c)
	if err != nil {
		return err
	}
	defer closePool()
	return f.whileKafka(ctx, client, func(ctx context.Context) error {
		return whileDatabase(ctx, engine, func() error { return do(ctx, client, engine) })
	})
}

// withDatabase calls do with an engine that has nothing to read from, for what needs Kafka only if there is something to read.
func (f *storesFlag) withDatabase(ctx context.Context, c postgres.Config, away error, do func(context.Context, *postgres.Engine) error) error {
	opening, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	pool, err := postgres.Open(opening, f.DatabaseURL)
	if err != nil {
		return err
	}
	defer pool.Close()
	if c.Partitions, err = postgres.Partitions(ctx, pool); err != nil {
		return err
	}
	c.Source = func(string) journal.Reader { return unreadable{away} }
	engine := postgres.New(pool, c)
	return whileDatabase(ctx, engine, func() error { return do(ctx, engine) })
}

// unreadable is a topic of brokers that do not answer.
type unreadable struct{ err error }

func (u unreadable) Read(context.Context, int32, int64, func(journal.Batch) error) error {
	return u.err
}
func (u unreadable) End(context.Context, int32) (int64, error) { return 0, u.err }

// whileDatabase does it if the database is fit for it, and says so when it went away.
func whileDatabase(ctx context.Context, engine *postgres.Engine, do func() error) error {
	if err := engine.Check(ctx); err != nil {
		return err
	}
	err := do()
	if err != nil && ctx.Err() == nil && !engine.Answers(ctx) {
		err = fmt.Errorf("the database has gone away: what was done until then stays, run it again when it is back (%w)", err)
	}
	return err
}

// openTimeout is how long an operation waits for the database.
const openTimeout = 15 * time.Second

type projectionsCmd struct {
	storesFlag
	JSON bool `help:"Print them as JSON."`
}

// Run implements the subcommand.
func (c *projectionsCmd) Run(ctx context.Context) error {
	if err := c.resolve(); err != nil {
		return err
	}
	client, partitions, err := c.connect(ctx, "wharf-projections")
	if err != nil {
		return err
	}
	defer client.Close()
	opening, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	pool, err := postgres.OpenQuery(opening, c.DatabaseURL)
	if err != nil {
		return err
	}
	defer pool.Close()
	ids, err := client.TopicIDs(ctx, projections.Topics)
	if err != nil {
		return err
	}
	status, err := projections.ReadStatus(ctx, pool, lags{client, partitions, ids})
	if err != nil {
		return err
	}
	if c.JSON {
		return printJSON(status)
	}
	w := tabwriter.NewWriter(stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "READ MODEL\tBUILD\tVERSION\tSTATE\tLAG\tSECONDS\tRATE/S\tPARKED\tVERIFIED\tPREVIOUS\tEVENTS SEEN")
	for _, b := range status.Items {
		var seen []string
		for _, topic := range slices.Sorted(maps.Keys(b.Position)) {
			seen = append(seen, fmt.Sprintf("%s %d", strings.TrimSuffix(topic, ".events"), b.Position[topic]))
		}
		before := "-"
		if p := b.Previous; p != nil {
			before = fmt.Sprintf("build %d, lag %d, until %s", p.Build, p.Lag, p.KeepUntil.Format("15:04:05"))
			if p.Parked > 0 {
				before += fmt.Sprintf(", %d parked", p.Parked)
			}
		}
		verified := "-"
		if v := b.Verified; v != nil {
			verified = fmt.Sprintf("%s, %d differ", v.At.Format("2006-01-02 15:04"), v.Differences)
		}
		fmt.Fprintf(w, "%s\t%d\t%d\t%s\t%d\t%.1f\t%.0f\t%d\t%s\t%s\t%s\n", b.Name, b.Build, b.Version, b.State, b.Lag, b.LagSeconds,
			b.Rate, b.Parked, verified, before, strings.Join(seen, ", "))
	}
	if len(status.Scratch) > 0 {
		fmt.Fprintln(w, "\nTO LOOK AT\tBUILD\tVERSION\tDROPPED AFTER\tTABLE")
	}
	for _, b := range status.Scratch {
		fmt.Fprintf(w, "%s\t%d\t%d\t%s\t%s\n", b.Name, b.Build, b.Version, b.KeepUntil.Format("15:04:05"), postgres.Table(b.Name, b.Build))
	}
	for _, b := range status.Items {
		if b.Error != "" {
			fmt.Fprintf(w, "\n%s is halted: %s\n", b.Name, b.Error)
		}
		if b.Skipped > 0 {
			fmt.Fprintf(w, "\n%s has left out what nobody can read: %d records\n", b.Name, b.Skipped)
		}
		if b.LastError != "" {
			fmt.Fprintf(w, "\n%s had trouble, last at %s\n", b.Name, b.LastError)
		}
	}
	fmt.Fprintln(w, "\nPOLICIES OF\tLAG")
	for _, p := range status.Policies {
		fmt.Fprintf(w, "%s\t%d\n", p.Service, p.Lag)
		for _, e := range p.Parked {
			fmt.Fprintf(w, "  stream %s waits at %s\t%s\n", e.Stream, e.Position, e.Halted)
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	fmt.Fprintf(stdout, "\nopen payment intents: %d\n", status.OpenIntents)
	return nil
}
