package postgres

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"

	"wharf/domain/inventory"
	"wharf/infra/journal"
	"wharf/projections"
)

// What somebody has changed behind the projector's back is found, row by row, and a replay does not swap a difference in
// that nobody asked for.
func TestAVerificationFindsEveryDifference(t *testing.T) {
	s := newShop()
	s.stock(50)
	for i := range 30 {
		s.order(i, 3)
	}
	pool := openTest(t)
	e := newEngine(t, pool, s)
	stop := start(t, e)
	s.caughtUp(t, pool)
	clean := verify(t, e, 0)
	if clean.Rows == 0 || clean.Events == 0 || clean.Hash == "" || clean.Hash == "0" {
		t.Errorf("the verification says %+v", clean)
	}
	stop()
	right := dump(t, pool, e.Models)
	for _, sql := range []string{
		"UPDATE %s SET status = 'lost', total = total + 1 WHERE id = '" + orderID(1) + "'",
		"DELETE FROM %s WHERE id = '" + orderID(2) + "'",
		"INSERT INTO %s SELECT gen_random_uuid(), customer, status, reason, lines, total, currency, version, placed_at, updated_at, payment, payment_version, shipment_status, shipment_version FROM %[1]s WHERE id = '" + orderID(3) + "'",
	} {
		table := "wharf_build_" + fmt.Sprint(one[int64](t, pool, "SELECT id FROM wharf.builds WHERE model = 'orders' AND state = 'live'")) + ".orders"
		if _, err := pool.Exec(t.Context(), fmt.Sprintf(sql, table)); err != nil {
			t.Fatal(err)
		}
	}
	var c Comparison
	if err := e.Verify(t.Context(), []string{"orders"}, func(Progress) {}, func(one Comparison) { c = one }); err != nil {
		t.Fatal(err)
	}
	if c.OnlyLive != 1 || c.OnlyFold != 1 || c.Differing != 1 || len(c.First) != 3 {
		t.Errorf("it found %+v", c)
	}
	kinds := map[string]Difference{}
	for _, d := range c.First {
		kinds[d.Kind] = d
	}
	want := map[string]Difference{
		"differing": {orderID(1), "differing", []string{"status", "total"},
			map[string]string{"status": "lost", "total": "1501"}, map[string]string{"status": "delivered", "total": "1500"}},
		"only_fold": {Key: orderID(2), Kind: "only_fold", Live: map[string]string{}, Fold: map[string]string{}},
	}
	delete(kinds, "only_live")
	if diff := cmp.Diff(want, kinds); diff != "" {
		t.Errorf("the differences are (-want +got):\n%s", diff)
	}
	var difference *DifferenceError
	err := e.Replay(t.Context(), []string{"orders"}, ReplayOptions{}, func(Progress) {})
	if !errors.As(err, &difference) || difference.Comparison.Differences() != 3 || !strings.Contains(err.Error(), orderID(1)) {
		t.Errorf("a replay says %v", err)
	}
	if n := one[int64](t, pool, "SELECT count(*) FROM wharf.builds"); n != int64(len(e.Models)) {
		t.Errorf("%d builds are left", n)
	}
	if err := e.Replay(t.Context(), []string{"orders"}, ReplayOptions{Force: true}, func(Progress) {}); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff(right, dump(t, pool, e.Models)); diff != "" {
		t.Errorf("after the replay rows differ (-want +got):\n%s", diff)
	}
	// The metric is that of the live build, whoever verified it.
	gauge := func() string {
		if err := e.look(t.Context()); err != nil {
			t.Fatal(err)
		}
		defer e.forget()
		all, err := prometheus.DefaultGatherer.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, family := range all {
			for _, m := range family.Metric {
				if family.GetName() == "wharf_projection_differences" && m.Label[0].GetValue() == "orders" {
					return fmt.Sprint(m.GetGauge().GetValue())
				}
			}
		}
		return "none"
	}
	if got := gauge(); got != "none" {
		t.Errorf("of a build that nobody has verified it says %s", got)
	}
	verify(t, e, 0)
	if got := gauge(); got != "0" {
		t.Errorf("of one that is right it says %s", got)
	}
}

func TestADifferenceIsShownWhereItBegins(t *testing.T) {
	long := strings.Repeat("é", 300)
	for _, tc := range [][4]string{
		{"lost", "delivered", "lost", "delivered"},
		{"", "x", "", "x"},
		{long + "1", long + "2", "…" + strings.Repeat("é", 20) + "1", "…" + strings.Repeat("é", 20) + "2"},
		{"1" + long, "2" + long, "1" + strings.Repeat("é", 99) + "…", "2" + strings.Repeat("é", 99) + "…"},
		{long, long + "1", "…" + strings.Repeat("é", 20), "…" + strings.Repeat("é", 20) + "1"},
	} {
		if a, b := excerpts(tc[0], tc[1]); a != tc[2] || b != tc[3] {
			t.Errorf("%q and %q are shown as %q and %q", tc[0], tc[1], a, b)
		}
	}
}

// Verifications hold while orders come in and projectors come and go.
func TestAVerificationHoldsWhileEverythingMoves(t *testing.T) {
	t.Parallel()
	s := newShop()
	s.stock(100)
	s.order(0, 3)
	pool := openTest(t)
	e := newEngine(t, pool, s)
	stop := start(t, e)
	ctx, cancel := context.WithCancel(context.Background())
	var others sync.WaitGroup
	var told atomic.Int64
	others.Go(func() {
		for i := 1; ctx.Err() == nil; i++ {
			s.order(i, 3)
			told.Add(1)
			s.near(t, pool)
		}
	})
	others.Go(func() {
		for ctx.Err() == nil {
			stop()
			stop = start(t, e)
			pause(ctx, 300*time.Millisecond) // it gets to work in between
		}
	})
	checker := newEngine(t, openURL(t, pool.Config().ConnString()), s, func(c *Config) {
		c.Source = func(topic string) journal.Reader { // it takes its time, in which others move on
			return before{s.reader(topic), func(ctx context.Context) error { pause(ctx, 5*time.Millisecond); return nil }}
		}
	})
	for range 3 {
		verify(t, checker, 0)
	}
	cancel()
	others.Wait()
	if told.Load() == 0 {
		t.Error("nothing happened meanwhile")
	}
}

// The previous build is kept up to date, and comes back in a moment, again and again; queries never see less than
// before. When it was kept for long enough it is gone, which is said.
func TestARollbackBringsThePreviousBuildBack(t *testing.T) {
	s := newShop()
	s.stock(20)
	for i := range 20 {
		s.order(i, 2)
	}
	pool := openTest(t)
	e := newEngine(t, pool, s)
	stop := start(t, e)
	s.caughtUp(t, pool)
	quiet := func(Progress) {}
	if err := e.Rollback(t.Context(), "sales", quiet); err == nil || !strings.Contains(err.Error(), "no previous build") {
		t.Errorf("rolled back to nothing: %v", err)
	}
	if err := e.Replay(t.Context(), []string{"sales"}, ReplayOptions{}, quiet); err != nil {
		t.Fatal(err)
	}
	id := func(state string) int64 {
		return one[int64](t, pool, "SELECT id FROM wharf.builds WHERE model = 'sales' AND state = $1", state)
	}
	fresh, old := id(live), id(previous)
	ctx, cancel := context.WithCancel(context.Background())
	var others sync.WaitGroup
	others.Go(func() {
		for i := 20; ctx.Err() == nil; i++ {
			s.order(i, 2)
			s.near(t, pool)
		}
	})
	others.Go(func() {
		for seen := int64(0); ctx.Err() == nil; {
			now := one[int64](t, pool, "SELECT coalesce(sum(orders), 0)::bigint FROM wharf_read.sales")
			if now < seen {
				t.Errorf("%d orders after %d", now, seen)
			}
			seen = now
		}
	})
	for range 5 {
		if err := e.Rollback(t.Context(), "sales", quiet); err != nil {
			t.Error(err)
		}
		if id(live) != old || id(previous) != fresh {
			t.Errorf("builds %d and %d are live and previous, want %d and %d", id(live), id(previous), old, fresh)
		}
		fresh, old = old, fresh
	}
	cancel()
	others.Wait()
	s.caughtUp(t, pool)
	eventually(t, "the previous build is up to date, too", func() bool { return s.lag(t, pool, previous) == 0 })
	verify(t, e, 0)
	stop()
	// A previous build without a projector is brought up to date by the rollback itself.
	s.order(1_000_000, 2)
	if err := e.Rollback(t.Context(), "sales", quiet); err != nil {
		t.Error(err)
	}
	if _, err := pool.Exec(t.Context(), "UPDATE wharf.builds SET version = 7 WHERE state = 'previous'"); err != nil {
		t.Fatal(err)
	}
	if err := e.Rollback(t.Context(), "sales", quiet); err == nil || !strings.Contains(err.Error(), "version 7") {
		t.Errorf("rolled back to another version: %v", err)
	}
	if _, err := pool.Exec(t.Context(), "UPDATE wharf.builds SET keep_until = now() WHERE state = 'previous'"); err != nil {
		t.Fatal(err)
	}
	if err := e.sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := one[int64](t, pool, "SELECT count(*) FROM wharf.builds WHERE state = 'previous'"); n != 0 {
		t.Errorf("%d previous builds are left", n)
	}
}

func TestABuildCanBeLeftAsideToBeLookedAt(t *testing.T) {
	s := newShop()
	s.order(1, 2)
	pool := openTest(t)
	e := newEngine(t, pool, s)
	stop := start(t, e)
	s.caughtUp(t, pool)
	var last Progress
	if err := e.Replay(t.Context(), []string{"orders"}, ReplayOptions{NoSwap: true}, func(p Progress) { last = p }); err != nil {
		t.Fatal(err)
	}
	if n := one[int64](t, pool, "SELECT count(*) FROM "+last.Table); n != 1 {
		t.Errorf("%d orders in %s", n, last.Table)
	}
	if n := one[int64](t, pool, "SELECT count(*) FROM wharf.builds WHERE state = 'live' AND id = $1", last.Build); n != 0 {
		t.Error("it is live")
	}
	stop()
	e.Keep = time.Nanosecond
	if err := e.Replay(t.Context(), []string{"orders"}, ReplayOptions{NoSwap: true}, func(p Progress) { last = p }); err != nil {
		t.Fatal(err)
	}
	if err := e.sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := one[int64](t, pool, "SELECT count(*) FROM wharf.builds WHERE id = $1", last.Build); n != 0 {
		t.Error("it is still there")
	}
}

func TestReadModelsAreVerifiedNowAndThen(t *testing.T) {
	s := newShop()
	s.order(1, 2)
	pool := openTest(t)
	e := newEngine(t, pool, s, func(c *Config) { c.Verify = 10 * time.Millisecond })
	start(t, e)
	before := lastVerified(t, "orders")
	eventually(t, "the orders are verified", func() bool { return lastVerified(t, "orders") > before })
}

// lastVerified is when the model was verified last.
func lastVerified(t *testing.T, model string) float64 {
	t.Helper()
	families, err := prometheus.DefaultGatherer.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == "wharf_projection_verified_timestamp_seconds" && m.GetLabel()[0].GetValue() == model {
				return m.GetGauge().GetValue()
			}
		}
	}
	return 0
}

// near waits until live projection is not far behind: a log in memory grows faster than any table.
func (s *shop) near(t *testing.T, pool *pgxpool.Pool) {
	t.Helper()
	eventually(t, "live projection comes near", func() bool { return s.lag(t, pool, live) < 500 })
}

// The views of a release before get their new column without making queries queue behind somebody who reads for long.
func TestASetUpGivesWayToALongQuery(t *testing.T) {
	s := newShop()
	s.order(1, 1)
	pool := openTest(t)
	newEngine(t, pool, s)
	id := one[int64](t, pool, "SELECT id FROM wharf.builds WHERE model = 'ledger'")
	if _, err := pool.Exec(t.Context(), fmt.Sprintf(`DROP VIEW wharf_read.ledger;
		CREATE VIEW wharf_read.ledger AS SELECT partition, account, currency, balance FROM wharf_build_%d.ledger`, id)); err != nil {
		t.Fatal(err)
	}
	reader, err := pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := reader.Exec(t.Context(), "SELECT count(*) FROM wharf_read.ledger"); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	other := New(openURL(t, pool.Config().ConnString()), Config{Source: s.reader, Partitions: partitions})
	go func() { done <- other.Setup(context.Background()) }()
	waiting := "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'relation'"
	eventually(t, "the set-up waits", func() bool { return one[int64](t, pool, waiting) > 0 })
	for range 20 {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		if _, err := pool.Exec(ctx, "SELECT count(*) FROM wharf_read.ledger"); err != nil {
			t.Errorf("a query behind the set-up: %v", err)
		}
		cancel()
	}
	if err := reader.Rollback(t.Context()); err != nil {
		t.Error(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	_ = one[bool](t, pool, "SELECT coalesce(bool_or(stale), false) FROM wharf_read.ledger")
}

// A snapshot is begun when it is needed: reading what came in meanwhile may take longer than a transaction may be idle.
func TestAVerificationHoldsNoTransactionWhileItReads(t *testing.T) {
	s := newShop()
	s.order(1, 1)
	pool := openTest(t)
	e := newEngine(t, pool, s)
	start(t, e)
	s.caughtUp(t, pool)
	idle := "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction' AND query ILIKE '%repeatable read%'"
	var mu sync.Mutex
	var most int64
	checker := newEngine(t, openURL(t, pool.Config().ConnString()), s, func(c *Config) {
		c.Source = func(topic string) journal.Reader {
			return before{s.reader(topic), func(context.Context) error {
				mu.Lock()
				defer mu.Unlock()
				most = max(most, one[int64](t, pool, idle))
				return nil
			}}
		}
	})
	meanwhile := sync.OnceFunc(func() {
		s.order(2, 1)
		s.caughtUp(t, pool)
	})
	err := checker.Verify(t.Context(), []string{"sales"}, func(p Progress) {
		if p.Phase == PhaseVerifying {
			meanwhile()
		}
	}, func(Comparison) {})
	if err != nil || most > 0 {
		t.Errorf("%d transactions were idle while the log was read: %v", most, err)
	}
}

// A verification that a new version overtakes says so, and has found nothing.
func TestAVerificationIsOvertakenByANewVersion(t *testing.T) {
	s := newShop()
	s.tell("MUG", inventory.Received{Quantity: 5})
	pool, e := s.projected(t, func(c *Config) { c.Models = []projections.Model{shelf(1, new(atomic.Bool))} })
	newer := New(pool, Config{Models: []projections.Model{shelf(2, new(atomic.Bool))}, Source: s.reader, Partitions: partitions})
	err := e.Verify(t.Context(), []string{"shelf"}, func(p Progress) {
		if p.Phase == PhaseVerifying {
			if err := newer.Replay(t.Context(), []string{"shelf"}, ReplayOptions{Force: true}, func(Progress) {}); err != nil {
				t.Error(err)
			}
		}
	}, func(Comparison) { t.Error("there is a result") })
	if !errors.Is(err, errOtherVersion) {
		t.Error(err)
	}
}

// An event that is given up during a verification is no difference.
func TestADiscardDuringAVerificationIsNoDifference(t *testing.T) {
	e, _, at := brokenShelf(t)
	err := e.Verify(t.Context(), []string{"shelf"}, func(p Progress) {
		if p.Phase == PhaseVerifying {
			if err := e.DiscardParked(t.Context(), "shelf", at.String()); err != nil {
				t.Error(err)
			}
		}
	}, func(Comparison) { t.Error("there is a result") })
	if err == nil || !strings.Contains(err.Error(), "given up meanwhile") {
		t.Error(err)
	}
	verify(t, e, 0)
}

// A verification of what was swapped out, or whose view was made anew, since its snapshot was taken finds nothing wrong with that.
func TestAVerificationLooksAtTheViewOfItsSnapshot(t *testing.T) {
	s := newShop()
	s.stock(10)
	pool, e := s.projected(t)
	exec := func(db querier, sql string) {
		t.Helper()
		if _, err := db.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	snapshot := func() pgx.Tx {
		t.Helper()
		tx, err := pool.BeginTx(t.Context(), pgx.TxOptions{IsoLevel: pgx.RepeatableRead})
		if err != nil {
			t.Fatal(err)
		}
		exec(tx, "SELECT count(*) FROM wharf.builds")
		return tx
	}
	compare := func(tx pgx.Tx, b build) string {
		t.Helper()
		c, err := e.compare(t.Context(), tx, projections.Stock, b, b)
		if err != nil {
			t.Fatal(err)
		}
		if err := tx.Rollback(t.Context()); err != nil {
			t.Fatal(err)
		}
		return c.Unread
	}
	old := liveOf(t, e, "stock")
	before := snapshot()
	if err := e.Replay(t.Context(), []string{"stock"}, ReplayOptions{}, func(Progress) {}); err != nil {
		t.Fatal(err)
	}
	if unread := compare(before, old); unread != "" {
		t.Errorf("swapped after the snapshot: %s", unread)
	}
	if unread := compare(snapshot(), old); unread != "" {
		t.Errorf("swapped before it: %s", unread)
	}
	now := liveOf(t, e, "stock")
	before = snapshot()
	exec(pool, "DROP VIEW wharf_read.stock")
	exec(pool, "CREATE VIEW wharf_read.stock AS SELECT 1 AS other")
	if unread := compare(before, now); unread != "" {
		t.Errorf("the view was made anew after the snapshot: %s", unread)
	}
	if unread := compare(snapshot(), now); unread == "" {
		t.Error("queries read something else")
	}
}

// What is verified in the background is what queries read, too.
func TestTheBackgroundSeesThatAViewIsGone(t *testing.T) {
	s := newShop()
	s.stock(10)
	pool, _ := s.projected(t, func(c *Config) { c.Models = []projections.Model{projections.Stock} })
	if _, err := pool.Exec(t.Context(), "DROP VIEW wharf_read.stock; UPDATE wharf.builds SET verified_at = 'epoch'"); err != nil {
		t.Fatal(err)
	}
	var said strings.Builder
	e := New(pool, Config{Models: []projections.Model{projections.Stock}, Partitions: partitions, Source: s.reader, Verify: time.Hour,
		Logger: slog.New(slog.NewTextHandler(&said, nil))})
	if err := e.verifyAll(t.Context()); err != nil || strings.Contains(said.String(), "was verified") || !strings.Contains(said.String(), "not what queries read") {
		t.Error(err, said.String())
	}
}
