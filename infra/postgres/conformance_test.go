package postgres

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5/pgxpool"

	"wharf/domain"
	"wharf/infra/journal"
	"wharf/projections"
)

// TestReadModelsConform is what every read model has to pass, those of today and of tomorrow: whatever order its topics
// come in, however many events come at a time, whatever comes twice, and wherever the connection to the database breaks,
// its rows are what Apply makes of the log, live and after a replay.
func TestReadModelsConform(t *testing.T) {
	s := newShop()
	s.stock(5)
	for i := range 12 {
		s.order(i, 2)
		s.repeat(i)
	}
	for _, m := range projections.All {
		t.Run(m.Name, func(t *testing.T) { t.Parallel(); conform(t, m, s) })
	}
}

// repeat has every public partition tell its last few events again, as a publisher that took over may.
func (s *shop) repeat(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, topic := range s.topics {
		for p := range int32(partitions) {
			var records []journal.Record
			end, _ := topic.End(context.Background(), p)
			_ = lastRecords(topic, p, max(0, end-int64(1+n%4)), end, &records)
			if len(records) > 0 {
				s.append(name, records...)
			}
		}
	}
}

func lastRecords(r journal.Reader, p int32, from, to int64, records *[]journal.Record) error {
	if from >= to {
		return nil
	}
	err := r.Read(context.Background(), p, from, func(b journal.Batch) error {
		*records = append(*records, b.Records...)
		return errEnough
	})
	if errors.Is(err, errEnough) {
		return nil
	}
	return err
}

func conform(t *testing.T, m projections.Model, s *shop) {
	want := foldOf(t, m, s)
	if len(want) == 0 {
		t.Fatal("no event of the shop concerns it: tell more")
	}
	rows := func(when string, pool *pgxpool.Pool) {
		t.Helper()
		if diff := cmp.Diff(want, rowsOf(t, m, pool)); diff != "" {
			t.Errorf("%s: the rows are not what Apply makes of the log (-want +got):\n%s", when, diff)
		}
	}
	only := func(c *Config) { c.Models = []projections.Model{m} }

	for _, batch := range []int{1, 5000} {
		for seed := range uint64(2) {
			t.Run(fmt.Sprintf("interleaved, %d at a time, seed %d", batch, seed), func(t *testing.T) {
				pool := openTest(t)
				e := newEngine(t, pool, s, only, func(c *Config) {
					c.Batch = batch
					c.Source = func(topic string) journal.Reader {
						return hesitant{s.reader(topic), &sync.Mutex{}, rand.New(rand.NewPCG(seed, uint64(len(topic))))}
					}
					if seed == 1 {
						c.Copy = 1
					}
				})
				start(t, e)
				s.caughtUp(t, pool)
				rows("live", pool)
			})
		}
	}
	t.Run("replayed", func(t *testing.T) {
		for name, bulk := range map[string]limits{"in memory": bulkLimits, "in pieces": {events: 3, bytes: 1 << 20, rows: 2}} {
			pool := openTest(t)
			e := newEngine(t, pool, s, only)
			e.bulk = bulk
			start(t, e)
			s.caughtUp(t, pool)
			if err := e.Replay(t.Context(), []string{m.Name}, ReplayOptions{}, func(Progress) {}); err != nil {
				t.Error(err)
			}
			rows(name, pool)
			verify(t, e, 0)
		}
	})
	for _, copied := range []int{1, 1000} {
		t.Run(fmt.Sprintf("cut off anywhere, with COPY from %d rows on", copied), func(t *testing.T) { cutOffAnywhere(t, m, s, want, copied) })
	}
}

// hesitant hands out a few records at a time, and pauses before some, so that topics come in many orders.
type hesitant struct {
	journal.Reader
	mu     *sync.Mutex
	random *rand.Rand
}

func (r hesitant) Read(ctx context.Context, p int32, from int64, f func(journal.Batch) error) error {
	return r.Reader.Read(ctx, p, from, func(b journal.Batch) error {
		for len(b.Records) > 0 {
			r.mu.Lock()
			n, pause := min(1+r.random.IntN(4), len(b.Records)), time.Duration(r.random.IntN(3))*time.Millisecond
			r.mu.Unlock()
			piece := journal.Batch{Records: b.Records[:n], Next: b.Records[n-1].Offset + 1}
			if b.Records = b.Records[n:]; len(b.Records) == 0 {
				piece.Next = b.Next
			}
			select {
			case <-time.After(pause):
			case <-ctx.Done():
				return ctx.Err()
			}
			if err := f(piece); err != nil {
				return err
			}
		}
		return nil
	})
}

// foldOf is the rows that Apply makes of the log, without any database, as text by the text of their key. It also sees
// that Apply is pure: it leaves the row it is given alone, and comes to the same again.
func foldOf(t *testing.T, m projections.Model, s *shop) map[string]string {
	t.Helper()
	type entry struct{ key, row any }
	rows := map[string]*entry{}
	for _, topic := range m.Topics {
		for p := range int32(partitions) {
			end, err := s.reader(topic).End(t.Context(), p)
			if err != nil {
				t.Fatal(err)
			}
			last := int64(0)
			err = read(t.Context(), s.reader(topic), topic, p, 0, end, func(r domain.Recorded) error {
				if process, err := journal.Next(last, r); err != nil || !process {
					return err
				}
				last = r.Seq
				event, listens, err := m.Decode(r)
				if err != nil || !listens {
					return err
				}
				for _, key := range m.Touched(event) {
					e := rows[m.KeyText(key)]
					if e == nil {
						e = &entry{key, m.New()}
						rows[m.KeyText(key)] = e
					}
					before := textOf(t, m, key, e.row)
					again := m.Clone(e.row)
					next := m.Clone(e.row)
					m.Apply(key, next, event)
					if now := textOf(t, m, key, e.row); now != before {
						t.Errorf("Apply has changed the row that it was given:\n%s\n%s", before, now)
					}
					m.Apply(key, again, event)
					if a, b := textOf(t, m, key, again), textOf(t, m, key, next); a != b {
						t.Errorf("Apply comes to two results:\n%s\n%s", a, b)
					}
					e.row = next
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	text := map[string]string{}
	for key, e := range rows {
		text[key] = textOf(t, m, e.key, e.row)
	}
	return text
}

func textOf(t *testing.T, m projections.Model, key, row any) string {
	t.Helper()
	values, err := m.Values(key, row)
	if err != nil {
		t.Fatal(err)
	}
	for i, v := range values {
		if at, ok := v.(time.Time); ok {
			values[i] = at.UTC()
		}
	}
	return fmt.Sprint(values)
}

// rowsOf is the rows of the live build, as foldOf has them.
func rowsOf(t *testing.T, m projections.Model, pool *pgxpool.Pool) map[string]string {
	t.Helper()
	found, err := pool.Query(t.Context(), "SELECT "+columnNames(m.Columns)+" FROM wharf_read."+quote(m.Name))
	if err != nil {
		t.Fatal(err)
	}
	defer found.Close()
	text := map[string]string{}
	for found.Next() {
		key, row, err := m.Scan(found)
		if err != nil {
			t.Fatal(err)
		}
		text[keyText(t, m, key)] = textOf(t, m, key, row)
	}
	if found.Err() != nil {
		t.Fatal(found.Err())
	}
	return text
}

// keyText is the key's text as the fold has it: times are in UTC there.
func keyText(t *testing.T, m projections.Model, key any) string {
	t.Helper()
	parsed, err := m.ParseKey(m.KeyText(key))
	if err != nil {
		t.Fatal(err)
	}
	return m.KeyText(parsed)
}

// cuts is at how many places of a run the connection is cut, each once before and once after what was under way is done.
const cuts = 6

// cutOffAnywhere breaks the connection to the database before or after a read or a write, and sees that what begins anew
// comes to the same rows.
func cutOffAnywhere(t *testing.T, m projections.Model, s *shop, want map[string]string, copied int) {
	pool := openTest(t)
	e := newEngine(t, pool, s, func(c *Config) { c.Models = []projections.Model{m} })
	table := one[string](t, pool, "SELECT 'wharf_build_' || id || '.' || quote_ident(model) FROM wharf.builds WHERE state = 'live'")
	run := func(cut *cutter) {
		for _, sql := range []string{"DELETE FROM " + table, `UPDATE wharf.tasks SET epoch = epoch + 1,
			offsets = array_fill(0, ARRAY[cardinality(offsets)]), seqs = array_fill(0, ARRAY[cardinality(seqs)])`} {
			if _, err := pool.Exec(t.Context(), sql); err != nil {
				t.Fatal(err)
			}
		}
		config := pool.Config()
		config.ConnConfig.DialFunc = cut.dial
		faulty, err := pgxpool.NewWithConfig(t.Context(), config)
		if err != nil {
			t.Fatal(err)
		}
		defer faulty.Close()
		c := e.Config
		c.Poll, c.Copy = 20*time.Millisecond, copied
		stop := start(t, New(faulty, c))
		defer stop()
		s.caughtUp(t, pool)
		if diff := cmp.Diff(want, rowsOf(t, m, pool)); diff != "" {
			t.Errorf("cut off %+v: the rows are not what Apply makes of the log (-want +got):\n%s", cut, diff)
		}
	}
	whole := &cutter{}
	run(whole)
	for i := range int64(cuts) {
		at := 1 + i*whole.done.Load()/cuts
		run(&cutter{at: at, before: true})
		run(&cutter{at: at})
	}
}

// cutter cuts one connection at its n-th read or write, of all those of its connections together.
type cutter struct {
	at     int64
	before bool
	done   atomic.Int64
}

func (c *cutter) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	return &cutConn{conn, c}, nil
}

type cutConn struct {
	net.Conn
	cutter *cutter
}

var errCut = errors.New("the connection was cut")

func (c *cutConn) Read(b []byte) (int, error)  { return c.cut(c.Conn.Read, b) }
func (c *cutConn) Write(b []byte) (int, error) { return c.cut(c.Conn.Write, b) }

func (c *cutConn) cut(do func([]byte) (int, error), b []byte) (int, error) {
	now := c.cutter.done.Add(1) == c.cutter.at
	if now && c.cutter.before {
		_ = c.Close()
		return 0, errCut
	}
	n, err := do(b)
	if now {
		_ = c.Close()
		return 0, errCut
	}
	return n, err
}
