package postgres

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"wharf/domain"
	"wharf/domain/inventory"
	"wharf/domain/shipping"
	"wharf/projections"
)

// groups share partitions out as a group of Kafka may: who was there first has all of them until it goes.
type groups struct{ sync.Map }

func (g *groups) share(ctx context.Context, name string, _ []string, owned func(context.Context, int32)) error {
	made, _ := g.LoadOrStore(name, make(chan struct{}, 1))
	turn := made.(chan struct{})
	select {
	case <-ctx.Done():
		return nil
	case turn <- struct{}{}:
	}
	defer func() { <-turn }()
	runIn(ctx, owned, allPartitions...)
	return nil
}

// During a rolling update there are programs of the old version and of the new one, which can only run their own builds' tasks:
// live rows are up to date all the same, before the swap and after it, and when the update is taken back.
func TestTheLiveBuildIsUpToDateDuringARollingUpdate(t *testing.T) {
	older, newer := projections.Shipments, projections.Shipments
	newer.Version++
	with := func(m projections.Model) func(*Config) {
		return func(c *Config) { c.Models = []projections.Model{m, projections.Stock} }
	}
	s := newShop()
	s.stock(10)
	told := 0
	more := func() {
		for range 30 { // some in every partition
			s.order(told, 1)
			told++
		}
	}
	more()
	pool := openTest(t)
	var kafka groups
	e1 := newEngine(t, pool, s, with(older))
	startWith(t, e1, kafka.share)
	stop := startWith(t, newEngine(t, openURL(t, pool.Config().ConnString()), s, with(older)), kafka.share)
	exec := func(sql string) {
		t.Helper()
		if _, err := pool.Exec(context.Background(), sql); err != nil {
			t.Fatal(err)
		}
	}
	// The new program cannot swap at first.
	exec(`CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
		IF NEW.state = 'live' THEN RAISE EXCEPTION 'not yet'; END IF; RETURN NEW; END $$`)
	exec("CREATE TRIGGER wait BEFORE UPDATE ON wharf.builds FOR EACH ROW EXECUTE FUNCTION wait()")
	e2 := newEngine(t, openURL(t, pool.Config().ConnString()), s, with(newer))
	startWith(t, e2, kafka.share)
	more()
	s.caughtUp(t, pool)
	exec("DROP FUNCTION wait CASCADE")
	version := "SELECT version FROM wharf.builds WHERE model = 'shipments' AND state = 'live'"
	eventually(t, "the new version is live", func() bool { return one[int](t, pool, version) == newer.Version })
	stop() // one of the old programs is gone
	more()
	s.caughtUp(t, pool)
	if err := e1.Rollback(t.Context(), "shipments", func(Progress) {}); err != nil {
		t.Fatal(err)
	}
	more()
	eventually(t, "the new version is live again", func() bool { return one[int](t, pool, version) == newer.Version })
	more()
	s.caughtUp(t, pool)
	// Now there is no build of the old version any more.
	if err := e2.Replay(t.Context(), []string{"shipments"}, ReplayOptions{}, func(Progress) {}); err != nil {
		t.Fatal(err)
	}
	more()
	s.caughtUp(t, pool)
	if n := one[int](t, pool, "SELECT count(*) FROM wharf_read.shipments"); n != told {
		t.Errorf("there are %d shipments of %d", n, told)
	}
}

// A new version is not built while its group has given nobody a task: until then nobody would run the new build. Nor is its program
// ready before it is live: somebody might stop the old one.
func TestAnUpgradeWaitsForItsGroup(t *testing.T) {
	newer := projections.Stock
	newer.Version++
	s := newShop()
	s.stock(30)
	pool := openTest(t)
	var kafka groups
	startWith(t, newEngine(t, pool, s, func(c *Config) { c.Models = []projections.Model{projections.Stock} }), kafka.share)
	s.caughtUp(t, pool)
	hold, err := pool.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer hold.Release()
	class, object := modelLock("stock")
	if _, err := hold.Exec(t.Context(), "SELECT pg_advisory_lock($1, $2)", class, object); err != nil {
		t.Fatal(err)
	}
	e := newEngine(t, openURL(t, pool.Config().ConnString()), s, func(c *Config) { c.Models = []projections.Model{newer} })
	made := one[int64](t, pool, "SELECT last_value FROM wharf.builds_id_seq")
	quiet := func(when string) {
		t.Helper()
		pause(t.Context(), 20*e.Poll)
		if n := one[int64](t, pool, "SELECT last_value FROM wharf.builds_id_seq") - made; n > 0 {
			t.Errorf("%d builds were made %s", n, when)
		}
		if e.Ready() == nil {
			t.Errorf("the new program is ready %s", when)
		}
	}
	startWith(t, e, func(ctx context.Context, name string, topics []string, owned func(context.Context, int32)) error {
		eventually(t, "it sees the live build", func() bool {
			e.mu.Lock()
			defer e.mu.Unlock()
			return e.kept[role{"stock", live}] != nil
		})
		quiet("before its group had given it something")
		// It gets tasks, but somebody else is at work on the read model; and it loses them again.
		member, leave := context.WithCancel(ctx)
		time.AfterFunc(20*e.Poll, leave)
		runIn(member, owned, allPartitions...)
		eventually(t, "no try is under way any more", func() bool {
			return one[int](t, pool, "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = $1", whoami) == 0
		})
		unlock(ctx, hold, class, object)
		quiet("when its group had taken back what it gave")
		return kafka.share(ctx, name, topics, owned)
	})
	eventually(t, "the new version is live", func() bool { return liveOf(t, e, "stock").version == newer.Version })
	eventually(t, "the new program is ready", func() bool { return e.Ready() == nil })
	s.stock(60)
	s.caughtUp(t, pool)
}

// Two databases on one Kafka, to move from one to the other or to try something, take no tasks from each other.
func TestEachDatabaseHasGroupsOfItsOwn(t *testing.T) {
	s := newShop()
	s.stock(10)
	var kafka groups
	one, other := openTest(t), openTest(t)
	for _, pool := range []*pgxpool.Pool{one, other} {
		startWith(t, newEngine(t, pool, s), kafka.share)
	}
	s.caughtUp(t, one)
	s.caughtUp(t, other)
}

// A start of an older program does not replace a newer program's build whose table is gone.
func TestAnOlderProgramReplacesNothingNewer(t *testing.T) {
	newer := projections.Stock
	newer.Version++
	s := newShop()
	s.stock(10)
	pool, e := s.projected(t, func(c *Config) { c.Models = []projections.Model{newer} })
	if _, err := pool.Exec(t.Context(), "DROP TABLE "+liveOf(t, e, "stock").table()+" CASCADE"); err != nil {
		t.Fatal(err)
	}
	newEngine(t, pool, s, func(c *Config) { c.Models = []projections.Model{projections.Stock} })
	if b := liveOf(t, e, "stock"); b.version != newer.Version {
		t.Errorf("the live build is of version %d", b.version)
	}
}

// told counts the lines of a log that say that something is tried again.
type told struct{ atomic.Int64 }

func (n *told) Write(line []byte) (int, error) {
	if bytes.Contains(line, []byte("is tried again")) {
		n.Add(1)
	}
	return len(line), nil
}

// An upgrade that cannot be, because the topics are others than the live build was made of, makes no builds again and again.
func TestAnUpgradeThatCannotBeMakesNoBuilds(t *testing.T) {
	newer := projections.Stock
	newer.Version++
	s := newShop()
	s.stock(10)
	pool, _ := s.projected(t, func(c *Config) { c.Models, c.TopicIDs = []projections.Model{projections.Stock}, ids("the first") })
	made := "SELECT last_value FROM wharf.builds_id_seq"
	before := one[int64](t, pool, made)
	var tries told
	start(t, newEngine(t, pool, s, func(c *Config) {
		c.Models, c.TopicIDs = []projections.Model{newer}, ids("the second")
		c.Logger = slog.New(slog.NewTextHandler(&tries, nil))
	}))
	eventually(t, "it has been tried three times", func() bool { return tries.Load() >= 3 })
	if n := one[int64](t, pool, made) - before; n > 0 {
		t.Errorf("%d builds were made", n)
	}
}

func TestANewVersionIsBuiltBesideTheOldOneAndSwappedIn(t *testing.T) {
	type key struct {
		Order string `db:"order_id text"`
	}
	type row1 struct {
		Status string `db:"status text"`
	}
	type row2 struct {
		Events int64  `db:"events bigint"`
		Status string `db:"status varchar"`
	}
	keys := func(e projections.Event) []key { return []key{{e.Stream}} }
	events := map[string]domain.Events{projections.ShippingTopic: shipping.Events}
	v1 := projections.Define(projections.Spec[key, row1]{Name: "parcels", Version: 1, Events: events, Keys: keys,
		Apply: func(_ key, r row1, e projections.Event) row1 { return row1{e.Name} }})
	v2 := projections.Define(projections.Spec[key, row2]{Name: "parcels", Version: 2, Events: events, Keys: keys,
		Apply: func(_ key, r row2, e projections.Event) row2 { return row2{r.Events + 1, e.Name} }})

	s := newShop()
	for i := range 30 {
		s.order(i, 1)
	}
	pool := openTest(t)
	with := func(m projections.Model) func(*Config) {
		return func(c *Config) { c.Models = []projections.Model{m} }
	}
	older := newEngine(t, pool, s, with(v1))
	start(t, older)
	s.caughtUp(t, pool)
	if n := one[int64](t, pool, "SELECT count(*) FROM wharf_read.parcels"); n != 30 {
		t.Fatalf("there are %d parcels", n)
	}
	// The new program comes while the old one runs; of the new ones two at once.
	newer := newEngine(t, openURL(t, pool.Config().ConnString()), s, with(v2))
	start(t, newer)
	start(t, newEngine(t, openURL(t, pool.Config().ConnString()), s, with(v2)))
	version := "SELECT version FROM wharf.builds WHERE model = 'parcels' AND state = 'live'"
	eventually(t, "the new version is live", func() bool { return one[int64](t, pool, version) == 2 })
	for i := 30; i < 40; i++ {
		s.order(i, 1)
	}
	s.caughtUp(t, pool)
	if n := one[int64](t, pool, "SELECT sum(events)::bigint FROM wharf_read.parcels"); n != 3*40 {
		t.Errorf("%d events in the new version, want %d", n, 3*40)
	}
	// The old program, started again, leaves the newer build alone.
	old := newEngine(t, openURL(t, pool.Config().ConnString()), s, with(v1))
	if err := old.look(context.Background()); err != nil {
		t.Fatal(err)
	}
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	if b := old.current(ended, v1, live); b != nil {
		t.Errorf("it would run on build %d of version %d", b.id, b.version)
	}
	start(t, old)
	s.order(40, 1)
	s.caughtUp(t, pool)
	if v, n := one[int64](t, pool, version), one[int64](t, pool, "SELECT count(*) FROM wharf.builds WHERE version = 1 AND state NOT IN ('retired', 'previous')"); v != 2 || n != 0 {
		t.Errorf("version %d is live, and there are %d of version 1", v, n)
	}
	// Nor does it replace it, and a program that comes too late builds nothing.
	for _, force := range []bool{false, true} {
		if err := old.Replay(t.Context(), []string{"parcels"}, ReplayOptions{Force: force}, func(Progress) {}); !errors.Is(err, errOtherVersion) {
			t.Errorf("a replay of the old version says %v", err)
		}
	}
	if err := newer.replay(t.Context(), v2, ReplayOptions{Force: true, upgrade: true}, func(Progress) {}); !errors.Is(err, errUpgraded) {
		t.Errorf("an upgrade that comes too late says %v", err)
	}
	if v := one[int64](t, pool, "SELECT version FROM wharf.builds WHERE state = 'previous'"); v != 1 {
		t.Errorf("version %d can be rolled back to", v)
	}
}

// A new version with another key has no row in common with the one before: it is not taken for the same.
func TestAnotherKeyIsAnotherReadModel(t *testing.T) {
	type bySKU struct {
		SKU string `db:"sku text"`
	}
	type byItem struct {
		Item string `db:"item text"`
	}
	type row struct {
		Events int64 `db:"events bigint"`
	}
	events := map[string]domain.Events{projections.InventoryTopic: inventory.Events}
	v1 := projections.Define(projections.Spec[bySKU, row]{Name: "counts", Version: 1, Events: events,
		Keys:  func(e projections.Event) []bySKU { return []bySKU{{e.Stream}} },
		Apply: func(_ bySKU, r row, _ projections.Event) row { return row{r.Events + 1} }})
	v2 := projections.Define(projections.Spec[byItem, row]{Name: "counts", Version: 2, Events: events,
		Keys:  func(e projections.Event) []byItem { return []byItem{{e.Stream}} },
		Apply: func(_ byItem, r row, _ projections.Event) row { return row{r.Events + 1} }})
	s := newShop()
	s.stock(20)
	pool, _ := s.projected(t, func(c *Config) { c.Models = []projections.Model{v1} })
	newer := newEngine(t, openURL(t, pool.Config().ConnString()), s, func(c *Config) { c.Models = []projections.Model{v2} })
	var difference *DifferenceError
	if err := newer.Replay(t.Context(), []string{"counts"}, ReplayOptions{}, func(Progress) {}); !errors.As(err, &difference) {
		t.Fatal(err)
	}
	if c := difference.Comparison; c.OnlyLive != 20 || c.OnlyFold != 20 {
		t.Errorf("%d rows are only in the live build, %d in the new one", c.OnlyLive, c.OnlyFold)
	}
}
