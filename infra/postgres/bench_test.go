package postgres

import (
	"context"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/errgroup"

	"wharf/domain"
	"wharf/domain/orders"
	"wharf/projections"
)

// The benchmarks measure the engine beside what the same Postgres can do at best with the same rows, in the same run:
// the metric "of-raw" is the ratio. `make bench` runs them.

// BenchmarkLive measures how many events a second the live projection of a read model takes in while it is behind. The
// raw limit writes the same rows in the same batches, with nothing to read, decode or fold: INSERT … SELECT unnest … ON
// CONFLICT and a checkpoint in one transaction.
func BenchmarkLive(b *testing.B) {
	s := benchShop(b)
	for _, m := range projections.All {
		b.Run(m.Name, func(b *testing.B) {
			var own, raw time.Duration
			for b.Loop() {
				own += live1(b, s, m)
				raw += rawUpsert(b, s, m)
			}
			report(b, s.events(m), own, raw)
		})
	}
}

// BenchmarkReplay measures a replay: from nothing to the swap, verification included. The raw limit of a read model with a
// row an event is COPY of the same rows and the making of the same indexes; for the others "of-raw" is the ratio to live
// projection of the same events.
func BenchmarkReplay(b *testing.B) {
	s := benchShop(b)
	for _, m := range projections.All {
		b.Run(m.Name, func(b *testing.B) {
			pool := openTest(b)
			e := newEngine(b, pool, s, func(c *Config) { c.Models = []projections.Model{m} })
			stop := start(b, e)
			s.caughtUp(b, pool)
			stop()
			var own, raw, filled time.Duration
			for b.Loop() {
				began := time.Now()
				err := e.Replay(context.Background(), []string{m.Name}, ReplayOptions{}, func(p Progress) {
					if p.Phase == PhaseVerifying {
						filled += time.Since(began)
					}
				})
				if err != nil {
					b.Fatal(err)
				}
				own += time.Since(began)
				if m.Append {
					raw += rawCopy(b, s, m)
				} else {
					raw += live1(b, s, m)
				}
			}
			report(b, s.events(m), own, raw)
			b.ReportMetric(float64(s.events(m))*float64(b.N)/filled.Seconds(), "filled/s")
			if !m.Append {
				b.ReportMetric(raw.Seconds()/filled.Seconds(), "of-live")
			}
		})
	}
}

// BenchmarkVisible measures how long an event takes from the log to a row that can be queried, at 1,000 orders/s, beside a
// bare loop: take an event, write its row, commit.
func BenchmarkVisible(b *testing.B) {
	const rate, seconds = 1000, 5
	for b.Loop() {
		s := newShop()
		pool := openTest(b)
		start(b, newEngine(b, pool, s, func(c *Config) {
			c.Models = []projections.Model{projections.Orders}
			c.Interval = 0 // the default, which newEngine has changed
			*c = New(nil, *c).Config
		}))
		p := NewPositions(pool)
		own := visible(rate, seconds, func(i int) func() {
			at := s.tell(orderID(i), orders.Placed{Customer: "C", Total: pounds(5)})
			return func() { _ = p.Wait(context.Background(), "orders", at, time.Minute) }
		})
		raw := rawVisible(b, rate, seconds)
		b.ReportMetric(own[0].Seconds()*1000, "p50-ms")
		b.ReportMetric(own[1].Seconds()*1000, "p99-ms")
		b.ReportMetric(raw[0].Seconds()*1000, "raw-p50-ms")
		b.ReportMetric(raw[1].Seconds()*1000, "raw-p99-ms")
	}
}

func report(b *testing.B, events int64, own, raw time.Duration) {
	b.ReportMetric(float64(events)*float64(b.N)/own.Seconds(), "events/s")
	b.ReportMetric(raw.Seconds()/own.Seconds(), "of-raw")
}

// live1 is how long live projection of the model takes for the whole log.
func live1(b *testing.B, s *shop, m projections.Model) time.Duration {
	pool := openTest(b)
	e := newEngine(b, pool, s, func(c *Config) { c.Models = []projections.Model{m} })
	began := time.Now()
	stop := start(b, e)
	defer stop()
	s.caughtUp(b, pool)
	return time.Since(began)
}

// batches is the rows that the engine writes of each partition, a batch an entry, folded beforehand.
func batches(b *testing.B, s *shop, m projections.Model, e *Engine, pool *pgxpool.Pool) [][][][]any {
	all, err := builds(b.Context(), pool, live)
	if err != nil {
		b.Fatal(err)
	}
	parts := make([][][][]any, partitions)
	for p := range parts {
		t, err := e.load(b.Context(), pool, m, all[0], int32(p))
		if err != nil {
			b.Fatal(err)
		}
		t.rows = newRowCache(true, 1<<30)
		n := 0
		flush := func() {
			rows, err := t.changed()
			if err != nil {
				b.Fatal(err)
			}
			if len(rows) > 0 {
				parts[p] = append(parts[p], rows)
			}
			t.rows.flushed(m.Append)
			n = 0
		}
		for _, topic := range m.Topics {
			end, _ := s.reader(topic).End(b.Context(), int32(p))
			err := read(b.Context(), s.reader(topic), topic, int32(p), 0, end, func(r domain.Recorded) error {
				event, listens, err := m.Decode(r)
				if err != nil || !listens {
					return err
				}
				a := arrival{Event: event}
				keys, err := t.keysOf(a)
				if err == nil {
					err = t.take(touch{a, keys, nil})
				}
				if n++; n == e.Batch {
					flush()
				}
				return err
			})
			if err != nil {
				b.Fatal(err)
			}
		}
		flush()
	}
	return parts
}

// rawUpsert is how long the same rows take in the same batches, and nothing else.
func rawUpsert(b *testing.B, s *shop, m projections.Model) time.Duration {
	pool := openTest(b)
	e := newEngine(b, pool, s, func(c *Config) { c.Models = []projections.Model{m} })
	parts := batches(b, s, m, e, pool)
	all, err := builds(b.Context(), pool, live)
	if err != nil {
		b.Fatal(err)
	}
	t := &task{model: m, build: all[0]}
	began := time.Now()
	var g errgroup.Group
	for p, part := range parts {
		g.Go(func() error {
			for i, rows := range part {
				batch := &pgx.Batch{}
				batch.Queue("UPDATE wharf.tasks SET skipped = $3 WHERE build = $1 AND partition = $2", t.build.id, p, i)
				batch.Queue(t.upsert(), arrays(m.Columns, rows)...)
				if err := pool.SendBatch(context.Background(), batch).Close(); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		b.Fatal(err)
	}
	return time.Since(began)
}

// rawCopy is how long COPY of the same rows and the making of the indexes take, and nothing else.
func rawCopy(b *testing.B, s *shop, m projections.Model) time.Duration {
	pool := openTest(b)
	e := newEngine(b, pool, s, func(c *Config) { c.Models = []projections.Model{m} })
	parts := batches(b, s, m, e, pool)
	var fresh build
	must := func(err error) {
		if err != nil {
			b.Fatal(err)
		}
	}
	must(pgx.BeginFunc(b.Context(), pool, func(tx pgx.Tx) (err error) {
		fresh, err = e.create(b.Context(), tx, m, forReplay)
		return err
	}))
	began := time.Now()
	var g errgroup.Group
	g.SetLimit(runtime.GOMAXPROCS(0))
	for _, part := range parts {
		g.Go(func() error {
			_, err := pool.CopyFrom(context.Background(), pgx.Identifier{fresh.schema(), m.Name}, names(m), pgx.CopyFromRows(slices.Concat(part...)))
			return err
		})
	}
	must(g.Wait())
	must(pgx.BeginFunc(b.Context(), pool, func(tx pgx.Tx) error { return finish(b.Context(), tx, m, fresh) }))
	return time.Since(began)
}

// visible has something done at the rate, waits for each, and returns the median and the 99th percentile of the waits.
func visible(rate, seconds int, do func(i int) (wait func())) [2]time.Duration {
	var mu sync.Mutex
	var took []time.Duration
	var all sync.WaitGroup
	began := time.Now()
	for i := range rate * seconds {
		time.Sleep(time.Until(began.Add(time.Duration(i) * time.Second / time.Duration(rate))))
		at := time.Now()
		wait := do(i)
		all.Go(func() {
			wait()
			mu.Lock()
			defer mu.Unlock()
			took = append(took, time.Since(at))
		})
	}
	all.Wait()
	slices.Sort(took)
	return [2]time.Duration{took[len(took)/2], took[len(took)*99/100]}
}

func rawVisible(b *testing.B, rate, seconds int) [2]time.Duration {
	pool := openTest(b)
	if _, err := pool.Exec(b.Context(), "CREATE TABLE raw (id text PRIMARY KEY, customer text, n bigint)"); err != nil {
		b.Fatal(err)
	}
	type event struct {
		id   string
		done chan struct{}
	}
	events := make(chan event, rate*seconds)
	go func() {
		for e := range events {
			_, _ = pool.Exec(context.Background(), `INSERT INTO raw VALUES ($1, 'C', 1) ON CONFLICT (id) DO UPDATE SET n = raw.n + 1`, e.id)
			close(e.done)
		}
	}()
	defer close(events)
	return visible(rate, seconds, func(i int) func() {
		e := event{orderID(i), make(chan struct{})}
		events <- e
		return func() { <-e.done }
	})
}

// events is how many events of the log are in the model's topics.
func (s *shop) events(m projections.Model) (n int64) {
	for _, topic := range m.Topics {
		for p := range int32(partitions) {
			end, _ := s.reader(topic).End(context.Background(), p)
			n += end
		}
	}
	return n
}

// benchShop is a log of 20 and more events an order.
func benchShop(b *testing.B) *shop {
	b.Helper()
	s := newShop()
	s.stock(100)
	for i := range 4000 {
		s.order(i, 4)
	}
	return s
}
