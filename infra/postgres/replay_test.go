package postgres

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"wharf/domain"
	"wharf/domain/inventory"
	"wharf/domain/shipping"
	"wharf/infra/journal"
	"wharf/projections"
)

func allNames(e *Engine) (list []string) {
	for _, m := range e.Models {
		list = append(list, m.Name)
	}
	return list
}

// inPieces hands out few records at a time.
type inPieces struct{ journal.Reader }

func (r inPieces) Read(ctx context.Context, p int32, from int64, f func(journal.Batch) error) error {
	return r.Reader.Read(ctx, p, from, func(b journal.Batch) error {
		for piece := range slices.Chunk(b.Records, 5) {
			if err := f(journal.Batch{Records: piece, Next: piece[len(piece)-1].Offset + 1}); err != nil {
				return err
			}
		}
		return nil
	})
}

func TestAReplayComesToTheSameRows(t *testing.T) {
	for name, bulk := range map[string]limits{
		"in memory": bulkLimits,
		"in pieces": {events: 7, bytes: 1 << 20, rows: 3}, // so that rows go to the table and are looked up again
	} {
		t.Run(name, func(t *testing.T) {
			s := newShop()
			s.stock(100)
			for i := range 200 {
				s.order(i, 2)
			}
			pool := openTest(t)
			e := newEngine(t, pool, s, func(c *Config) {
				if name == "in pieces" {
					c.Source = func(topic string) journal.Reader { return inPieces{s.reader(topic)} }
				}
			})
			e.bulk = bulk
			stop := start(t, e)
			s.caughtUp(t, pool)
			stop()
			want := dump(t, pool, e.Models)
			var last Progress
			phases := map[Phase]bool{}
			if err := e.Replay(context.Background(), allNames(e), ReplayOptions{}, func(p Progress) { last = p; phases[p.Phase] = true }); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, dump(t, pool, e.Models)); diff != "" {
				t.Errorf("rows of the replay differ from the live ones (-want +got):\n%s", diff)
			}
			if last.Done != last.Total || last.Total == 0 || len(phases) != 5 {
				t.Errorf("the last progress is %+v, phases %v", last, phases)
			}
			// Live projection goes on where the replay ended, on the new builds.
			start(t, e)
			s.order(1000, 6)
			s.caughtUp(t, pool)
			if n := one[int64](t, pool, "SELECT sum(orders)::bigint FROM wharf_read.sales"); n != 201 {
				t.Errorf("%d orders were sold, want 201", n)
			}
			for _, m := range e.Models {
				live := one[string](t, pool, "SELECT indexes FROM (SELECT string_agg(regexp_replace(indexdef, 'wharf_build_\\d+', ''), ' ' ORDER BY indexdef) AS indexes, schemaname FROM pg_indexes WHERE tablename = $1 GROUP BY schemaname) AS i, wharf.builds b WHERE schemaname = 'wharf_build_' || b.id AND b.state = 'live' AND b.model = $1", m.Name)
				old := one[string](t, pool, "SELECT indexes FROM (SELECT string_agg(regexp_replace(indexdef, 'wharf_build_\\d+', ''), ' ' ORDER BY indexdef) AS indexes, schemaname FROM pg_indexes WHERE tablename = $1 GROUP BY schemaname) AS i, wharf.builds b WHERE schemaname = 'wharf_build_' || b.id AND b.state = 'previous' AND b.model = $1", m.Name)
				if live != old || live == "" {
					t.Errorf("the indexes of %s are %s, and were %s", m.Name, live, old)
				}
			}
		})
	}
}

// beginReplay begins a replay of the orders of a shop, whose live builds are up to date and stand still.
func beginReplay(t *testing.T) *replay {
	t.Helper()
	s := newShop()
	for i := range 50 {
		s.order(i, 1)
	}
	_, e := s.projected(t)
	r, end, err := e.begin(t.Context(), projections.Orders, func(Progress) {}, forLooking)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { end(&err) })
	return r
}

// What is in memory at a time does not grow with the log: a partition that was read lets its rows go.
func TestARowIsInMemoryOnlyWhileItsPartitionIsRead(t *testing.T) {
	r := beginReplay(t)
	if err := r.fill(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, task := range r.tasks {
		if n := len(task.rows.young) + len(task.rows.old); n > 0 || task.rows.complete && task.at.seqs[0] > 0 {
			t.Errorf("partition %d has %d rows in memory", task.partition, n)
		}
	}
}

// A part is made of the whole log, but of no more rows than are asked for.
func TestAPartOfOneKeyHoldsNoOtherRow(t *testing.T) {
	r := beginReplay(t)
	_, until, err := r.livePositions(t.Context(), r.conn, "")
	if err != nil {
		t.Fatal(err)
	}
	for p, task := range r.tasks {
		task.wanted = matcher(projections.Orders, orderID(7))
		if err := task.run(t.Context(), until[p]); err != nil {
			t.Fatal(err)
		}
		for key := range task.rows.young {
			if !task.wanted(key) {
				t.Errorf("the row %v is in memory", key)
			}
		}
	}
}

// While orders come in and builds are swapped again and again, queries never fail and never see less than before; in
// the end all is as if nothing had been swapped.
func TestQueriesAndLiveProjectionGoOnDuringReplays(t *testing.T) {
	s := newShop()
	s.stock(100)
	for i := range 50 {
		s.order(i, 3)
	}
	pool := openTest(t)
	brief := func(c *Config) { c.Grace, c.Keep = 200*time.Millisecond, 200*time.Millisecond }
	e := newEngine(t, pool, s, brief)
	start(t, e)
	s.caughtUp(t, pool)
	query, err := OpenQuery(context.Background(), pool.Config().ConnString())
	if err != nil {
		t.Fatal(err)
	}
	defer query.Close()

	ctx, cancel := context.WithCancel(context.Background())
	var others sync.WaitGroup
	var queries atomic.Int64
	for _, sql := range []string{
		"SELECT count(*) FROM wharf_read.orders WHERE status = 'delivered'",
		"SELECT coalesce(sum(orders), 0)::bigint FROM wharf_read.sales",
		"SELECT count(*) FROM wharf_read.history",
		"SELECT sum(shipped)::bigint FROM wharf_read.stock",
	} {
		others.Go(func() {
			for seen := int64(1); ctx.Err() == nil; queries.Add(1) {
				var now int64
				if err := query.QueryRow(context.Background(), sql).Scan(&now); err != nil {
					t.Errorf("%s: %v", sql, err)
					return
				}
				if now < seen {
					t.Errorf("%s: %d after %d", sql, now, seen)
				}
				seen = now
			}
		})
	}
	told := 50
	others.Go(func() {
		for ; ctx.Err() == nil && told < 400; told++ {
			s.order(told, 3)
		}
	})
	other := newEngine(t, openURL(t, pool.Config().ConnString()), s, brief) // as wharf replay is: another process
	for range 2 {
		if err := other.Replay(ctx, []string{"orders", "history", "sales", "stock"}, ReplayOptions{}, func(Progress) {}); err != nil {
			t.Error(err)
		}
	}
	cancel()
	others.Wait()
	s.caughtUp(t, pool)
	if queries.Load() == 0 {
		t.Error("nobody asked anything")
	}
	if n := one[int64](t, pool, "SELECT sum(orders)::bigint FROM wharf_read.sales"); n != int64(told) {
		t.Errorf("%d orders were sold, want %d", n, told)
	}
	eventually(t, "old builds are dropped", func() bool {
		return one[int64](t, pool, "SELECT count(*) FROM wharf.builds") == int64(len(e.Models)) &&
			one[int64](t, pool, "SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'wharf_build_%'") == int64(len(e.Models))
	})
}

// asked has its own answer to where a partition ends, if it has one.
type asked struct {
	journal.Reader
	end func(ctx context.Context, p int32) (end int64, has bool, err error)
}

func (a asked) End(ctx context.Context, p int32) (int64, error) {
	if end, has, err := a.end(ctx, p); has || err != nil {
		return end, err
	}
	return a.Reader.End(ctx, p)
}

// However far live projection has got when the builds are swapped, queries do not go back behind it.
func TestASwapNeverGoesBackBehindLiveProjection(t *testing.T) {
	s := newShop()
	s.stock(100)
	s.order(0, 3)
	before := map[string][]int64{}
	for topic, sequence := range s.Seqs {
		before[topic] = slices.Clone(sequence)
	}
	for i := range 30 {
		s.order(1+i, 3)
	}
	pool := openTest(t)
	e := newEngine(t, pool, s)
	stop := start(t, e)
	s.caughtUp(t, pool)
	stop() // or it would make up for what is missing
	want := dump(t, pool, e.Models)
	once := map[string]*sync.Map{} // where topics ended before, by partition: seen once more
	for topic := range before {
		once[topic] = &sync.Map{}
	}
	e.Source = func(topic string) journal.Reader {
		return asked{s.reader(topic), func(_ context.Context, p int32) (int64, bool, error) {
			end, stale := once[topic].LoadAndDelete(p)
			if !stale {
				return 0, false, nil
			}
			return end.(int64), true, nil
		}}
	}
	err := e.Replay(context.Background(), allNames(e), ReplayOptions{}, func(progress Progress) {
		for topic, ends := range before {
			for p, end := range ends {
				if progress.Phase == PhaseSwapping { // it reads on to the end
					once[topic].Store(int32(p), end)
				}
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, dump(t, pool, e.Models)); diff != "" {
		t.Errorf("after the swap (-want +got):\n%s", diff)
	}
}

func TestAReplayIsAloneAndCanBeCutOff(t *testing.T) {
	s := newShop()
	s.order(1, 3)
	pool := openTest(t)
	e := newEngine(t, pool, s)
	start(t, e)
	s.caughtUp(t, pool)
	reached := make(chan struct{})
	reach := sync.OnceFunc(func() { close(reached) })
	slow := newEngine(t, openURL(t, pool.Config().ConnString()), s, func(c *Config) {
		c.Source = func(topic string) journal.Reader {
			return before{s.reader(topic), func(ctx context.Context) error {
				reach()
				<-ctx.Done()
				return ctx.Err()
			}}
		}
	})
	ctx, cancel := context.WithCancel(context.Background())
	first := make(chan error, 1)
	go func() { first <- slow.Replay(ctx, []string{"stock"}, ReplayOptions{}, func(Progress) {}) }()
	<-reached
	if err := e.Replay(context.Background(), []string{"stock"}, ReplayOptions{}, func(Progress) {}); !errors.Is(err, ErrReplaying) {
		t.Errorf("the second replay says %v", err)
	}
	if err := e.Replay(context.Background(), []string{"sales"}, ReplayOptions{}, func(Progress) {}); err != nil {
		t.Errorf("a replay of another read model: %v", err)
	}
	cancel()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Errorf("the first replay says %v", err)
	}
	unfinished := "SELECT count(*) FROM wharf.builds WHERE state = 'building'"
	if n := one[int64](t, pool, unfinished); n != 0 {
		t.Errorf("it left %d unfinished builds behind", n)
	}
	// One that was killed leaves its build behind, and the next clears it away.
	tx, err := pool.Begin(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.create(context.Background(), tx, projections.Stock, forReplay); err != nil {
		t.Fatal(err)
	}
	if err := tx.Commit(context.Background()); err != nil {
		t.Fatal(err)
	}
	if err := e.Replay(context.Background(), []string{"stock"}, ReplayOptions{}, func(Progress) {}); err != nil {
		t.Error(err)
	}
	if n := one[int64](t, pool, unfinished); n != 0 {
		t.Errorf("there are %d unfinished builds", n)
	}
	if err := e.Replay(context.Background(), []string{"stocks"}, ReplayOptions{}, nil); err == nil {
		t.Error("a replay of what there is not succeeds")
	}
}

// A query that takes long must not make others queue behind a swap that waits for it.
func TestASwapGivesWayToALongQuery(t *testing.T) {
	s := newShop()
	s.order(1, 3)
	pool := openTest(t)
	e := newEngine(t, pool, s)
	start(t, e)
	s.caughtUp(t, pool)
	ctx := context.Background()
	long, err := pool.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer long.Rollback(ctx)
	if _, err := long.Exec(ctx, "SELECT * FROM wharf_read.shipments"); err != nil {
		t.Fatal(err)
	}
	swapping := make(chan struct{})
	var once sync.Once
	done := make(chan error, 1)
	go func() {
		done <- e.Replay(ctx, []string{"shipments"}, ReplayOptions{}, func(p Progress) {
			if p.Phase == PhaseSwapping {
				once.Do(func() { close(swapping) })
			}
		})
	}()
	<-swapping
	for i := range 20 { // live projection and queries go on
		s.tell(orderID(100+i), shipping.Created{})
		s.caughtUp(t, pool)
		if n := one[int64](t, pool, "SELECT count(*) FROM wharf_read.shipments"); n != int64(i+2) {
			t.Fatalf("there are %d shipments, want %d", n, i+2)
		}
	}
	select {
	case err := <-done:
		t.Fatalf("the swap did not wait: %v", err)
	default:
	}
	if err := long.Rollback(ctx); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestPositionsAreShownForEveryBuild(t *testing.T) {
	s := newShop()
	s.order(1, 3)
	pool := openTest(t)
	e := newEngine(t, pool, s)
	start(t, e)
	s.caughtUp(t, pool)
	verify(t, e, 0)
	if err := e.Inspect(t.Context(), "stock", Part{}, func(Progress) {}); err != nil {
		t.Fatal(err)
	}
	show := func() (shown []string) {
		status, err := projections.ReadStatus(context.Background(), pool, testLags{s})
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range status.Items {
			shown = append(shown, fmt.Sprint(b.Name, b.Version, b.State, b.Lag, b.Error, b.Verified != nil && b.Verified.Differences == 0))
		}
		for _, b := range status.Scratch {
			shown = append(shown, fmt.Sprint(b.Name, " to look at ", b.KeepUntil.After(time.Now())))
		}
		return shown
	}
	want := []string{"history1live0true", "ledger1live0true", "orders1live0true", "payments1live0true", "sales1live0true",
		"shipments1live0true", "stock1live0true", "stock to look at true"}
	if got := show(); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	// One in the making is shown for as long as somebody is at it.
	r, end, err := e.begin(t.Context(), projections.Sales, func(Progress) {}, forReplay)
	if err != nil {
		t.Fatal(err)
	}
	if got := show(); !slices.ContainsFunc(got, func(s string) bool { return strings.HasPrefix(s, "sales1building") }) {
		t.Errorf("while a build is made: %v", got)
	}
	_ = r.conn.Conn().PgConn().Conn().Close() // killed
	eventually(t, "a build whose maker has died is not shown", func() bool { return slices.Equal(show(), want) })
	end(&err)
	if _, err := pool.Exec(t.Context(), "DELETE FROM wharf.tasks t USING wharf.builds b WHERE b.id = build AND model = 'orders' AND partition = 1"); err != nil {
		t.Fatal(err)
	}
	if got := show(); !slices.ContainsFunc(got, func(s string) bool {
		return strings.HasPrefix(s, "orders1halted") && strings.Contains(s, "partition 1: its row")
	}) {
		t.Errorf("without the row of a partition: %v", got)
	}
}

// testLags is projections.Lags on the topics in memory.
type testLags struct{ s *shop }

func (l testLags) TopicIDs() map[string]string { return nil }

func (l testLags) Ends(ctx context.Context, topics []string) (map[string]map[int32]int64, error) {
	ends := map[string]map[int32]int64{}
	for _, t := range topics {
		ends[t] = map[int32]int64{}
		for p := range int32(partitions) {
			end, err := l.s.topics[t].End(ctx, p)
			if err != nil {
				return nil, err
			}
			ends[t][p] = end
		}
	}
	return ends, nil
}

func (l testLags) Oldest(ctx context.Context, topic string, p int32, from int64) (at time.Time, found bool, err error) {
	err = l.s.reader(topic).Read(ctx, p, from, func(b journal.Batch) error {
		at, found = b.Records[0].Time, true
		return errEnough
	})
	if errors.Is(err, errEnough) {
		err = nil
	}
	return at, found, err
}

func (testLags) Policies(context.Context) ([]projections.PolicyLag, error) {
	return []projections.PolicyLag{{Service: "orders", Lag: 3}}, nil
}

// A lock, a swap or a slow statement of one read model holds up no other.
func TestALockOnOneReadModelHoldsUpNoOther(t *testing.T) {
	s := newShop()
	pool := openTest(t)
	start(t, newEngine(t, pool, s))
	s.caughtUp(t, pool)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	tx, err := pool.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(context.Background()) }()
	_, err = tx.Exec(ctx, `SELECT FROM wharf.tasks t JOIN wharf.builds b ON b.id = t.build
		WHERE b.model = 'sales' AND b.state = 'live' FOR UPDATE OF t`)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 100 { // sales has something to write in every partition
		s.order(i, 1)
	}
	eventually(t, "those of sales wait", func() bool {
		return one[int](t, pool, `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`) >= liveWriters
	})
	at := s.tell("MUG", inventory.Received{Quantity: 1})
	if err := NewPositions(pool).Wait(ctx, "stock", at, 20*time.Second); err != nil {
		t.Error(err)
	}
}

// A swap whose last catching up was too slow begins once more, with all of its tasks or not at all.
func TestASwapHasAllOfItsTasks(t *testing.T) {
	t.Parallel()
	s := newShop()
	for i := range 40 {
		s.order(i, 2)
	}
	pool, e := s.projected(t)
	more := func(from, to int) {
		for i := from; i < to; i++ {
			s.order(i, 2)
		}
		s.project(t, e)
	}

	var failing atomic.Bool // the tenth connection from then on is broken
	var acquired atomic.Int64
	config := pool.Config()
	config.PrepareConn = func(context.Context, *pgx.Conn) (bool, error) {
		if failing.Load() && acquired.Add(1) == 10 {
			failing.Store(false)
			return false, errors.New("a connection that broke")
		}
		return true, nil
	}
	unreliable, err := pgxpool.NewWithConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	defer unreliable.Close()
	onRead := func(context.Context) error { return nil }
	source := func(topic string) journal.Reader {
		return before{s.reader(topic), func(ctx context.Context) error { return onRead(ctx) }}
	}
	r, end, err := New(unreliable, Config{Source: source, Partitions: partitions, Parallel: 1}).
		begin(t.Context(), projections.Orders, func(Progress) {}, forReplay)
	if err != nil {
		t.Fatal(err)
	}
	defer end(&err)
	if err = r.fill(t.Context()); err != nil {
		t.Fatal(err)
	}
	more(40, 80)
	var meanwhile, slow sync.Once
	onRead = func(ctx context.Context) (err error) {
		meanwhile.Do(func() { more(80, 160) })
		locked := one[string](t, pool, "SELECT state FROM pg_stat_activity WHERE pid = $1", r.conn.Conn().PgConn().PID()) == "idle in transaction"
		if locked {
			slow.Do(func() {
				<-ctx.Done()
				failing.Store(true)
				err = ctx.Err()
			})
		}
		return err
	}
	if err = r.swap(t.Context()); err == nil || !strings.Contains(err.Error(), "a connection that broke") {
		t.Errorf("the swap says %v", err)
	}
	if n := one[int](t, pool, "SELECT count(*) FROM wharf_read.orders"); n != 160 {
		t.Errorf("queries see %d orders of 160", n)
	}
}

// A task that took the build for the live one, and had to wait for the swap, writes nothing.
func TestWhoWaitsForASwapWritesNothing(t *testing.T) {
	s := newShop()
	s.tell("MUG", inventory.Received{Quantity: 5})
	pool, e := s.projected(t)
	old := liveOf(t, e, "stock")
	late, err := e.load(t.Context(), pool, projections.Stock, old, journal.Partition([]byte("MUG"), partitions))
	if err != nil {
		t.Fatal(err)
	}
	s.tell("MUG", inventory.Received{Quantity: 1})
	r, end, err := e.begin(t.Context(), projections.Stock, func(Progress) {}, forReplay)
	if err != nil {
		t.Fatal(err)
	}
	defer end(&err)
	if err = r.fill(t.Context()); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	err = r.meet(t.Context(), func(tx pgx.Tx, _ build) error {
		go func() { done <- late.run(t.Context(), []int64{2}) }()
		eventually(t, "it waits for the lock", func() bool {
			return one[int](t, pool, "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'") > 0
		})
		return e.publish(t.Context(), tx, projections.Stock, r.build)
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := <-done; !isCode(err, codeMoved) {
		t.Errorf("it ends with %v", err)
	}
}

// What people have made of a build that they were left to look at keeps it from being dropped, and nothing else.
func TestAViewOnAnOldBuildStopsNoReplay(t *testing.T) {
	s := newShop()
	s.order(1, 2)
	pool, e := s.projected(t, func(c *Config) { c.Keep = time.Millisecond })
	var table string
	err := e.Replay(t.Context(), []string{"orders"}, ReplayOptions{NoSwap: true}, func(p Progress) { table = p.Table })
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pool.Exec(t.Context(), "CREATE VIEW public.mine AS SELECT * FROM "+table); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it need not be kept any more", func() bool {
		return one[bool](t, pool, "SELECT bool_and(keep_until < now()) FROM wharf.builds WHERE state = 'scratch'")
	})
	if err := e.Replay(t.Context(), []string{"stock"}, ReplayOptions{}, func(Progress) {}); err != nil {
		t.Error(err)
	}
	if err := e.Verify(t.Context(), []string{"sales"}, func(Progress) {}, func(Comparison) {}); err != nil {
		t.Error(err)
	}
}

// Somebody who reads the old build, for long, is in the way of its dropping, and not of the live one.
func TestTheLiveBuildDoesNotWaitForAnOldOneToBeDropped(t *testing.T) {
	s := newShop()
	s.stock(40)
	pool := openTest(t)
	e := newEngine(t, pool, s, func(c *Config) { c.Models, c.Grace = []projections.Model{projections.Stock}, 10*time.Millisecond })
	start(t, e)
	s.caughtUp(t, pool)
	old := one[int64](t, pool, "SELECT id FROM wharf.builds WHERE state = 'live'")
	if err := e.Replay(t.Context(), []string{"stock"}, ReplayOptions{}, func(Progress) {}); err != nil {
		t.Fatal(err)
	}
	tx, err := pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(context.Background()) }()
	if _, err := tx.Exec(t.Context(), "SELECT count(*) FROM "+Table("stock", old)); err != nil {
		t.Fatal(err)
	}
	if _, err := pool.Exec(t.Context(), "UPDATE wharf.builds SET keep_until = now() WHERE state = 'previous'"); err != nil {
		t.Fatal(err)
	}
	const dropping = `SELECT coalesce(max(query_start)::text, '') FROM pg_stat_activity
		WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE 'DROP TABLE%'`
	positions := NewPositions(pool)
	for range 5 { // a slow machine may not get there before the dropping is given up, for a moment
		var since string
		eventually(t, "it is to be dropped", func() bool { since = one[string](t, pool, dropping); return since != "" })
		var told []domain.Position
		for i := range 40 {
			told = append(told, s.tell(fmt.Sprintf("SKU-%d", i), inventory.Received{Quantity: 1}))
		}
		for _, at := range told {
			if err := positions.Wait(t.Context(), "stock", at, 20*time.Second); err != nil {
				t.Fatal(err)
			}
		}
		if one[string](t, pool, dropping) == since {
			return
		}
	}
	t.Error("the live build goes on only after the dropping was given up")
}

// A live build that has read more than there is (the topic lost records, or was made anew) is told of, not waited for; and
// --force builds of what there is.
func TestALogThatHasLostItsEnd(t *testing.T) {
	t.Parallel()
	s := newShop()
	s.stock(40)
	pool, e := s.projected(t)
	want := rowsOf(t, projections.Stock, pool)
	_, err := pool.Exec(t.Context(), `UPDATE wharf.tasks SET offsets = ARRAY[offsets[1] + 3], seqs = ARRAY[seqs[1] + 3]
		WHERE build = (SELECT id FROM wharf.builds WHERE model = 'stock' AND state = 'live')`)
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Verify(t.Context(), []string{"stock"}, func(Progress) {}, func(Comparison) {}); err == nil || !strings.Contains(err.Error(), "the log ends at") {
		t.Errorf("a verification says %v", err)
	}
	if err := e.Replay(t.Context(), []string{"stock"}, ReplayOptions{}, func(Progress) {}); err == nil || !strings.Contains(err.Error(), "the log ends at") {
		t.Errorf("a replay says %v", err)
	}
	if err := e.Replay(t.Context(), []string{"stock"}, ReplayOptions{Force: true, Lost: true}, func(Progress) {}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, rowsOf(t, projections.Stock, pool)); diff != "" {
		t.Error("the rows (-want +got):", diff)
	}
	start(t, e)
	at := s.tell("MUG", inventory.Received{Quantity: 1})
	if err := NewPositions(pool).Wait(t.Context(), "stock", at, 20*time.Second); err != nil {
		t.Error(err)
	}
}

// A live build whose table is gone has no rows: a replay replaces it, and so does a start.
func TestATableThatIsGoneIsBuiltAnew(t *testing.T) {
	s := newShop()
	s.stock(40)
	pool, e := s.projected(t)
	want := rowsOf(t, projections.Stock, pool)
	drop := func() {
		id := one[int64](t, pool, "SELECT id FROM wharf.builds WHERE model = 'stock' AND state = 'live'")
		if _, err := pool.Exec(t.Context(), "DROP TABLE "+Table("stock", id)+" CASCADE"); err != nil {
			t.Fatal(err)
		}
	}
	drop()
	if plans, err := e.Plan(t.Context(), []string{"stock"}); err != nil || plans[0].Rows != 0 || plans[0].Events == 0 {
		t.Errorf("a replay would be %+v: %v", plans, err)
	}
	var difference *DifferenceError
	if err := e.Replay(t.Context(), []string{"stock"}, ReplayOptions{}, func(Progress) {}); !errors.As(err, &difference) || difference.Comparison.OnlyFold != int64(len(want)) {
		t.Errorf("a replay says %v", err)
	}
	if err := e.Replay(t.Context(), []string{"stock"}, ReplayOptions{Force: true}, func(Progress) {}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, rowsOf(t, projections.Stock, pool)); diff != "" {
		t.Error("after a replay (-want +got):", diff)
	}
	drop()
	e = newEngine(t, pool, s)
	start(t, e)
	s.caughtUp(t, pool)
	if diff := cmp.Diff(want, rowsOf(t, projections.Stock, pool)); diff != "" {
		t.Error("after a start (-want +got):", diff)
	}
}

// A previous build that is up to date comes back although Kafka is away.
func TestARollbackNeedsNoKafka(t *testing.T) {
	s := newShop()
	s.stock(40)
	pool := openTest(t)
	e := newEngine(t, pool, s)
	stop := start(t, e)
	s.caughtUp(t, pool)
	if err := e.Replay(t.Context(), []string{"stock"}, ReplayOptions{}, func(Progress) {}); err != nil {
		t.Fatal(err)
	}
	s.caughtUp(t, pool)
	stop()
	e.Source = func(topic string) journal.Reader {
		return asked{s.reader(topic), func(ctx context.Context, _ int32) (int64, bool, error) {
			return 0, false, errors.New("nobody answers")
		}}
	}
	if err := e.Rollback(t.Context(), "stock", func(Progress) {}); err != nil {
		t.Error(err)
	}
}

// A leader that does not know its end yet is no log that has lost it, --force or not.
func TestAForcedSwapDoesNotGoBackEither(t *testing.T) {
	s := newShop()
	s.stock(40)
	pool, projector := s.projected(t)
	var stale atomic.Int64 // answers to come
	e := New(pool, projector.Config)
	e.Source = func(topic string) journal.Reader {
		return asked{s.reader(topic), func(context.Context, int32) (int64, bool, error) { return 0, stale.Add(-1) >= 0, nil }}
	}
	var once sync.Once
	err := e.Replay(t.Context(), []string{"stock"}, ReplayOptions{Force: true, Lost: true}, func(p Progress) {
		if p.Phase == PhaseSwapping {
			once.Do(func() {
				for range 40 {
					s.tell("MUG", inventory.Received{Quantity: 1})
				}
				s.project(t, projector)
				stale.Store(partitions + 3) // of reading on, and of three questions after that
			})
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if n := s.lag(t, pool, live); n != 0 {
		t.Errorf("queries went back by %d events", n)
	}
}

// A previous build whose time runs out while it is brought up comes back all the same.
func TestARollbackKeepsItsBuild(t *testing.T) {
	s := newShop()
	s.stock(40)
	pool, e := s.projected(t)
	if err := e.Replay(t.Context(), []string{"stock"}, ReplayOptions{}, func(Progress) {}); err != nil {
		t.Fatal(err)
	}
	at := s.tell("MUG", inventory.Received{Quantity: 1}) // which the live build gets, and the previous one does not
	task, err := e.load(t.Context(), pool, projections.Stock, liveOf(t, e, "stock"), at.Partition)
	if err == nil {
		err = task.run(t.Context(), []int64{at.Seq})
	}
	if err == nil {
		_, err = pool.Exec(t.Context(), "UPDATE wharf.builds SET keep_until = now() WHERE state = 'previous'")
	}
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	err = e.Rollback(ctx, "stock", func(p Progress) {
		if p.Phase == PhaseSwapping {
			if err := e.sweep(t.Context()); err != nil { // as a projector does
				t.Error(err)
			}
		}
	})
	if err != nil {
		t.Error(err)
	}
}

// Who locks the previous build holds up the live one as little as who locks another read model.
func TestALockOnThePreviousBuildHoldsUpNoOther(t *testing.T) {
	s := newShop()
	s.stock(40)
	pool := openTest(t)
	e := newEngine(t, pool, s, func(c *Config) { c.Models = []projections.Model{projections.Stock} })
	start(t, e)
	s.caughtUp(t, pool)
	old := liveOf(t, e, "stock")
	if err := e.Replay(t.Context(), []string{"stock"}, ReplayOptions{}, func(Progress) {}); err != nil {
		t.Fatal(err)
	}
	tx, err := pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(context.Background()) }()
	if _, err := tx.Exec(t.Context(), "LOCK TABLE "+old.table()+" IN SHARE MODE"); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		var last []domain.Position
		for i := range 40 {
			last = append(last, s.tell(fmt.Sprintf("SKU%d", i), inventory.Received{Quantity: 1}))
		}
		for _, at := range last {
			if err := NewPositions(pool).Wait(t.Context(), "stock", at, 20*time.Second); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// A rollback whose build retires while it is brought up says so, and does not go round and round.
func TestARollbackOfWhatRetiresEnds(t *testing.T) {
	s := newShop()
	s.stock(40)
	pool, e := s.projected(t, func(c *Config) { c.Models, c.Keep = []projections.Model{projections.Stock}, 50*time.Millisecond })
	if err := e.Replay(t.Context(), []string{"stock"}, ReplayOptions{}, func(Progress) {}); err != nil {
		t.Fatal(err)
	}
	at := s.tell("MUG", inventory.Received{Quantity: 1})
	task, err := e.load(t.Context(), pool, projections.Stock, liveOf(t, e, "stock"), at.Partition)
	if err == nil {
		err = task.run(t.Context(), []int64{at.Seq})
	}
	if err != nil {
		t.Fatal(err)
	}
	var reads atomic.Int64
	e.Source = func(topic string) journal.Reader {
		return before{s.reader(topic), func(ctx context.Context) error {
			if reads.Add(1) > 1 {
				return nil
			}
			for { // it takes longer than the build is kept
				if err := e.sweep(ctx); err != nil {
					return err
				}
				if one[int](t, pool, "SELECT count(*) FROM wharf.builds WHERE state = 'previous'") == 0 || !pause(ctx, time.Millisecond) {
					return nil
				}
			}
		}}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := e.Rollback(ctx, "stock", func(Progress) {}); !errors.Is(err, errSwapped) && !errors.Is(err, ErrNoPrevious) {
		t.Errorf("it says %v", err)
	}
}
