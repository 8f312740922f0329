package postgres

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"wharf/domain"
	"wharf/domain/domaintest"
	"wharf/domain/inventory"
	"wharf/domain/orders"
	"wharf/infra/embedded/pgtest"
	"wharf/infra/journal"
	"wharf/infra/journal/journaltest"
	"wharf/projections"
)

const partitions = 12

var allPartitions = []int32{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}

// shop is the public topics in memory, and the streams that are told there.
type shop struct {
	topics map[string]*journal.Memory

	mu sync.Mutex
	*journaltest.Teller
}

func newShop() *shop {
	clock := time.Date(2026, 3, 31, 23, 59, 0, 123456789, time.UTC)
	s := &shop{topics: map[string]*journal.Memory{}, Teller: journaltest.NewTeller(clock, partitions, projections.Topics...)}
	for _, t := range projections.Topics {
		s.topics[t] = journal.NewMemory(partitions)
	}
	return s
}

func (s *shop) reader(topic string) journal.Reader { return s.topics[topic] }

func topicOf(e domain.Event) string {
	switch kind, _, _ := strings.Cut(e.EventName(), "."); kind {
	case "order":
		return projections.OrdersTopic
	case "stock":
		return projections.InventoryTopic
	case "payment":
		return projections.PaymentsTopic
	default:
		return projections.ShippingTopic
	}
}

// tell publishes the events of one stream, each a millisecond after the last. It returns the last one's position.
func (s *shop) tell(stream string, events ...domain.Event) domain.Position {
	s.mu.Lock()
	defer s.mu.Unlock()
	var last domain.Position
	var records []journal.Record
	for _, e := range events {
		data, err := domain.Encode(e)
		if err != nil {
			panic(err)
		}
		r := s.Next(topicOf(e), stream, e.EventName(), data)
		last = r.Position
		records = append(records, journal.NewEventRecord(r))
	}
	s.append(last.Topic, records...)
	return last
}

// raw publishes an event as it is.
func (s *shop) raw(topic, stream, name string, data string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.append(topic, journal.NewEventRecord(s.Next(topic, stream, name, []byte(data))))
}

func (s *shop) append(topic string, records ...journal.Record) {
	if err := s.topics[topic].AppendBatch(context.Background(), records[0].Partition, records); err != nil {
		panic(err)
	}
}

func pounds(amount int64) domain.Money { return domain.Money{Amount: amount, Currency: "GBP"} }

func orderID(i int) string { return uuid.NewSHA1(uuid.Nil, fmt.Appendf(nil, "order %d", i)).String() }

// place tells how order i went, from its placing to its delivery, with so many lines of SKU-0, SKU-1, …
func (s *shop) order(i, lines int) {
	var told []orders.Line
	for l := range lines {
		told = append(told, orders.Line{SKU: fmt.Sprintf("SKU-%d", (i+l)%100), Quantity: int64(1 + l%3), UnitPrice: pounds(250)})
	}
	domaintest.Deliver(uuid.MustParse(orderID(i)), fmt.Sprintf("customer %d", i%10), told,
		func(stream string, events ...domain.Event) { s.tell(stream, events...) })
}

func (s *shop) stock(skus int) {
	for i := range skus {
		s.tell(fmt.Sprintf("SKU-%d", i), inventory.Received{Quantity: 1_000_000}, inventory.Adjusted{Delta: -3, Reason: "broken"})
	}
}

func openTest(t testing.TB) *pgxpool.Pool {
	t.Helper()
	return openURL(t, pgtest.TestDatabase(t))
}

func openURL(t testing.TB, url string) *pgxpool.Pool {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	pool, err := Open(ctx, url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	return pool
}

func newEngine(t testing.TB, pool *pgxpool.Pool, s *shop, change ...func(*Config)) *Engine {
	t.Helper()
	c := Config{Source: s.reader, Partitions: partitions, Interval: time.Millisecond, Poll: 10 * time.Millisecond,
		Logger: slog.New(slog.DiscardHandler)}
	for _, f := range change {
		f(&c)
	}
	e := New(pool, c)
	if err := e.Setup(context.Background()); err != nil {
		t.Fatal(err)
	}
	return e
}

// projected is a new database whose live builds have all that the shop has told, and where nobody is at work any more.
func (s *shop) projected(t testing.TB, change ...func(*Config)) (*pgxpool.Pool, *Engine) {
	t.Helper()
	pool := openTest(t)
	return pool, s.projectedBy(t, pool, change...)
}

// projectedBy has such an engine bring the database there.
func (s *shop) projectedBy(t testing.TB, pool *pgxpool.Pool, change ...func(*Config)) *Engine {
	t.Helper()
	e := newEngine(t, pool, s, change...)
	s.project(t, e)
	return e
}

// project runs the engine until its database has all that the shop has told.
func (s *shop) project(t testing.TB, e *Engine) {
	t.Helper()
	stop := start(t, e)
	s.caughtUp(t, e.pool)
	stop()
}

// start runs the engine in all partitions, until stop is called or the test ends.
func start(t testing.TB, e *Engine) (stop func()) {
	t.Helper()
	return startIn(t, e, allPartitions...)
}

// startIn is start in some partitions.
func startIn(t testing.TB, e *Engine, partitions ...int32) (stop func()) {
	t.Helper()
	return startWith(t, e, func(ctx context.Context, _ string, _ []string, owned func(context.Context, int32)) error {
		runIn(ctx, owned, partitions...)
		return nil
	})
}

func runIn(ctx context.Context, owned func(context.Context, int32), partitions ...int32) {
	var wg sync.WaitGroup
	for _, p := range partitions {
		wg.Go(func() { owned(ctx, p) })
	}
	wg.Wait()
}

func startWith(t testing.TB, e *Engine, share Share) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan struct{})
	go func() {
		defer close(ran)
		if err := e.Run(ctx, share); err != nil {
			t.Error(err)
		}
	}()
	stop = func() { cancel(); <-ran }
	t.Cleanup(stop)
	return stop
}

// eventually waits until f is true. It asks again and again; it fails the test only when there is no hope left.
func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never came to pass: %s", what)
		}
	}
}

// lag is how far the builds in that state are behind.
func (s *shop) lag(t testing.TB, pool *pgxpool.Pool, state string) (n int64) {
	t.Helper()
	rows, err := pool.Query(context.Background(), "SELECT topics, partition, offsets FROM wharf_read.builds WHERE state = $1", state)
	if err != nil {
		t.Fatal(err)
	}
	var topics []string
	var partition int32
	var offsets []int64
	_, err = pgx.ForEachRow(rows, []any{&topics, &partition, &offsets}, func() error {
		for i, topic := range topics {
			end, err := s.topics[topic].End(context.Background(), partition)
			if err != nil {
				return err
			}
			n += end - offsets[i]
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func (s *shop) caughtUp(t testing.TB, pool *pgxpool.Pool) {
	t.Helper()
	eventually(t, "the live builds are up to date", func() bool { return s.lag(t, pool, live) == 0 })
}

// dump is all rows of every live build, as text.
func dump(t testing.TB, pool *pgxpool.Pool, models []projections.Model) map[string][]string {
	t.Helper()
	all := map[string][]string{}
	for _, m := range models {
		rows, err := pool.Query(context.Background(), "SELECT v::text FROM wharf_read."+quote(m.Name)+" v ORDER BY 1")
		if err != nil {
			t.Fatal(err)
		}
		if all[m.Name], err = pgx.CollectRows(rows, pgx.RowTo[string]); err != nil {
			t.Fatal(err)
		}
		slices.Sort(all[m.Name])
	}
	return all
}

func one[T any](t testing.TB, pool *pgxpool.Pool, sql string, args ...any) (v T) {
	t.Helper()
	if err := pool.QueryRow(context.Background(), sql, args...).Scan(&v); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return v
}

// before does something before it hands out what it has read.
type before struct {
	journal.Reader
	do func(ctx context.Context) error
}

func (r before) Read(ctx context.Context, p int32, from int64, f func(journal.Batch) error) error {
	return r.Reader.Read(ctx, p, from, func(b journal.Batch) error {
		if err := r.do(ctx); err != nil {
			return err
		}
		return f(b)
	})
}
