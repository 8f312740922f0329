package postgres

import (
	"context"
	"testing"

	"wharf/infra/journal"
	"wharf/projections"
)

// partitionsBehind is how far the live build is behind in these partitions. It does not read the table.
func (s *shop) partitionsBehind(t *testing.T, e *Engine, m projections.Model, partitions ...int32) (n int64) {
	t.Helper()
	b := liveOf(t, e, m.Name)
	for _, p := range partitions {
		offsets := one[[]int64](t, e.pool, "SELECT offsets FROM wharf.tasks WHERE build = $1 AND partition = $2", b.id, p)
		for i, topic := range b.topics {
			end, err := s.topics[topic].End(context.Background(), p)
			if err != nil {
				t.Fatal(err)
			}
			n += end - offsets[i]
		}
	}
	return n
}

// leaderless is a topic of which nobody knows one partition's end, and nobody can read another.
type leaderless struct {
	journal.Reader
	end, read int32
}

func (r leaderless) End(ctx context.Context, p int32) (int64, error) {
	if p == r.end {
		<-ctx.Done()
		return 0, ctx.Err()
	}
	return r.Reader.End(ctx, p)
}

func (r leaderless) Read(ctx context.Context, p int32, from int64, f func(journal.Batch) error) error {
	if p == r.read {
		<-ctx.Done()
		return ctx.Err()
	}
	return r.Reader.Read(ctx, p, from, f)
}

// A partition without a leader keeps nobody from helping with the others.
func TestHelpDoesNotWaitForALeader(t *testing.T) {
	s := newShop()
	s.stock(40)
	pool := openTest(t)
	e := newEngine(t, pool, s, func(c *Config) {
		c.Models = []projections.Model{projections.Stock}
		c.Source = func(topic string) journal.Reader { return leaderless{s.reader(topic), 11, 10} }
	})
	startIn(t, e, 0, 1, 2, 3, 4, 5)
	eventually(t, "partitions 6 to 9 are brought on", func() bool {
		return s.partitionsBehind(t, e, projections.Stock, 6, 7, 8, 9) == 0
	})
}

// A table that is locked keeps nobody from helping with the others.
func TestHelpDoesNotWaitForALock(t *testing.T) {
	s := newShop()
	pool := openTest(t)
	e := newEngine(t, pool, s, func(c *Config) { c.Models = []projections.Model{projections.Shipments, projections.Stock} })
	tx, err := openURL(t, pool.Config().ConnString()).Begin(t.Context())
	if err == nil {
		_, err = tx.Exec(t.Context(), "LOCK TABLE "+liveOf(t, e, "shipments").table()+" IN ACCESS EXCLUSIVE MODE")
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(context.Background()) }()
	for i := range 30 {
		s.order(i, 1)
	}
	startIn(t, e, 0, 1, 2, 3, 4, 5)
	eventually(t, "somebody waits for the lock", func() bool {
		return one[int](t, pool, "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'") >= liveWriters+1
	})
	s.stock(60)
	eventually(t, "the other read model is brought on", func() bool {
		return s.partitionsBehind(t, e, projections.Stock, 6, 7, 8, 9, 10, 11) == 0
	})
}

// When nearly everything is locked there are still connections for what is not.
func TestALockOnNearlyEverythingHoldsUpNothingElse(t *testing.T) {
	s := newShop()
	s.stock(30)
	for i := range 30 {
		s.order(i, 1)
	}
	pool := openTest(t)
	e := newEngine(t, pool, s)
	start(t, e)
	s.caughtUp(t, pool)
	if err := e.Replay(t.Context(), allNames(e), ReplayOptions{}, func(Progress) {}); err != nil {
		t.Fatal(err)
	}
	s.caughtUp(t, pool)
	other := openURL(t, pool.Config().ConnString())
	tx, err := other.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(context.Background()) }()
	all, err := builds(t.Context(), other, live, previous)
	if err != nil {
		t.Fatal(err)
	}
	free := e.Models[len(e.Models)-1]
	for _, b := range all {
		if b.model == free.Name {
			continue
		}
		if _, err := tx.Exec(t.Context(), "LOCK TABLE "+b.table()+" IN ACCESS EXCLUSIVE MODE"); err != nil {
			t.Fatal(err)
		}
	}
	s.stock(60)
	for i := 30; i < 90; i++ {
		s.order(i, 1)
	}
	looking := &Engine{pool: other}
	eventually(t, "the read model that is not locked goes on", func() bool {
		return s.partitionsBehind(t, looking, free, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11) == 0
	})
}
