package postgres

import (
	"bytes"
	"context"
	"log/slog"
	"net/url"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
	"go.uber.org/goleak"

	"wharf/domain"
	"wharf/domain/inventory"
	"wharf/domain/orders"
	"wharf/domain/payments"
	"wharf/domain/shipping"
	"wharf/infra/embedded/pgtest"
	"wharf/infra/journal"
	"wharf/projections"
)

func TestRowsAreWhatTheEventsSay(t *testing.T) {
	s := newShop()
	s.stock(100)
	for i := range 50 {
		s.order(i, 10)
	}
	pool := openTest(t)
	e := newEngine(t, pool, s)
	before := goleak.IgnoreCurrent()
	// A connection that was slow to write may leave this behind until it is used again or closed.
	reader := goleak.IgnoreAnyFunction("github.com/jackc/pgx/v5/pgconn/internal/bgreader.(*BGReader).bgRead")
	stop := start(t, e)
	s.caughtUp(t, pool)
	// 50 orders of 10 lines with 1, 2, 3, 1, … units at 2.50: 19 units and 47.50 an order.
	for sql, want := range map[string]int64{
		"SELECT count(*) FROM wharf_read.orders WHERE status = 'delivered' AND version = 15 AND total = 4750": 50,
		"SELECT count(*) FROM wharf_read.orders WHERE payment_version = 4 AND shipment_status = 'delivered'":  50,
		"SELECT count(*) FROM wharf_read.history":                                                             50 * (15 + 4 + 3 + 20),
		"SELECT sum(shipped)::bigint FROM wharf_read.stock":                                                   50 * 19,
		"SELECT count(*) FROM wharf_read.stock WHERE received - 3 <> available + shipped OR reserved <> 0":    0,
		"SELECT sum(balance)::bigint FROM wharf_read.ledger WHERE account = 'receivable'":                     50 * 4750,
		"SELECT sum(balance)::bigint FROM wharf_read.ledger":                                                  0,
		"SELECT sum(revenue)::bigint FROM wharf_read.sales":                                                   50 * 4750,
		"SELECT sum(units)::bigint FROM wharf_read.sales":                                                     50 * 19,
		"SELECT sum(orders)::bigint FROM wharf_read.sales":                                                    50,
		"SELECT count(*) FROM wharf_read.shipments WHERE version = 3 AND carrier = 'Post'":                    50,
		"SELECT count(*) FROM wharf_read.payments WHERE json_array_length(movements) = 4":                     50,
		"SELECT sum(open_intents)::bigint FROM wharf_read.payments":                                           0,
		"SELECT sum(skipped)::bigint FROM wharf_read.builds":                                                  0,
	} {
		if got := one[int64](t, pool, sql); got != want {
			t.Errorf("%s: got %d, want %d", sql, got, want)
		}
	}
	stop()
	goleak.VerifyNone(t, before, reader)
}

func TestNothingIsLostOrDoubledWhateverIsCutOff(t *testing.T) {
	quiet := newShop()
	s := newShop()
	pool, again := openTest(t), openTest(t)
	admin := openURL(t, pool.Config().ConnString())
	for _, shop := range []*shop{s, quiet} {
		shop.stock(100)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range 150 {
			s.order(i, 8)
		}
	}()
	// Projectors come and go in the middle of their work, two at a time; their connections are cut.
	for round, running := 0, true; running; round++ {
		var stops []func()
		for range 2 {
			e := newEngine(t, openURL(t, pool.Config().ConnString()), s, func(c *Config) { c.Batch = 50 })
			stops = append(stops, start(t, e))
		}
		var seen int64
		eventually(t, "some progress", func() bool {
			now := one[int64](t, admin, "SELECT sum(o)::bigint FROM wharf.tasks, unnest(offsets) o")
			defer func() { seen = now }()
			return seen > 0 && now > seen || s.lag(t, admin, live) == 0
		})
		if _, err := admin.Exec(context.Background(), `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
			WHERE datname = current_database() AND pid <> pg_backend_pid()`); err != nil {
			t.Fatal(err)
		}
		for _, stop := range stops {
			stop()
		}
		select {
		case <-done:
			running = round < 5
		default:
		}
	}
	pool.Reset() // its connections have been cut, too
	start(t, newEngine(t, pool, s))
	s.caughtUp(t, pool)

	for i := range 150 {
		quiet.order(i, 8)
	}
	e := newEngine(t, again, quiet)
	start(t, e)
	quiet.caughtUp(t, again)
	if diff := cmp.Diff(dump(t, again, e.Models), dump(t, pool, e.Models)); diff != "" {
		t.Errorf("rows differ from those of an undisturbed run (-want +got):\n%s", diff)
	}
	if n := one[int64](t, pool, "SELECT sum(orders)::bigint FROM wharf_read.sales"); n != 150 {
		t.Errorf("%d orders were sold, want 150", n)
	}
}

type dayKey struct {
	Partition int32     `db:"partition int"`
	Day       time.Time `db:"day timestamptz"`
}

type dayRow struct {
	Units int64 `db:"units bigint"`
}

// A row that is read from the table is the one of its key: times are equal only if their zones are, too.
func TestATimeInAKeyIsTheSameAfterARestart(t *testing.T) {
	m := projections.Define(projections.Spec[dayKey, dayRow]{Name: "days", Version: 1,
		Events: map[string]domain.Events{projections.InventoryTopic: inventory.Events},
		Keys: func(e projections.Event) []dayKey {
			return []dayKey{{e.Partition, e.Time.Truncate(1000 * time.Hour)}}
		},
		Apply: func(_ dayKey, r dayRow, e projections.Event) dayRow {
			r.Units += e.Fact.(inventory.Received).Quantity
			return r
		},
	})
	s := newShop()
	pool := openTest(t)
	e := newEngine(t, pool, s, func(c *Config) { c.Models = []projections.Model{m} })
	for range 3 {
		s.tell("SKU", inventory.Received{Quantity: 1})
		stop := start(t, e)
		s.caughtUp(t, pool)
		stop()
	}
	if n := one[int64](t, pool, "SELECT sum(units)::bigint FROM wharf_read.days"); n != 3 {
		t.Errorf("%d units, want 3", n)
	}
}

func TestADatabaseThatIsAwayIsWaitedFor(t *testing.T) {
	s := newShop()
	s.stock(10)
	target := pgtest.TestDatabase(t)
	other, err := url.Parse(pgtest.TestDatabase(t)) // the same server
	if err != nil {
		t.Fatal(err)
	}
	pool, elsewhere := openURL(t, target), openURL(t, other.String())
	name := pgx.Identifier{pool.Config().ConnConfig.Database}.Sanitize()
	start(t, newEngine(t, pool, s))
	s.caughtUp(t, pool)
	for _, sql := range []string{
		"ALTER DATABASE " + name + " ALLOW_CONNECTIONS false",
		"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '" + strings.Trim(name, `"`) + "'",
	} {
		if _, err := elsewhere.Exec(context.Background(), sql); err != nil {
			t.Fatal(err)
		}
	}
	s.order(1, 5)
	if err := pool.Ping(context.Background()); err == nil {
		t.Fatal("the database is not away")
	}
	if _, err := elsewhere.Exec(context.Background(), "ALTER DATABASE "+name+" ALLOW_CONNECTIONS true"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is back", func() bool { return pool.Ping(context.Background()) == nil })
	s.caughtUp(t, pool)
	if n := one[int64](t, pool, "SELECT count(*) FROM wharf_read.orders WHERE status = 'delivered'"); n != 1 {
		t.Errorf("%d orders are delivered, want 1", n)
	}
}

func TestATaskWhosePositionWasMovedWritesNothing(t *testing.T) {
	s := newShop()
	s.tell("MUG", inventory.Received{Quantity: 5})
	pool := openTest(t)
	e := newEngine(t, pool, s, func(c *Config) { c.Models = []projections.Model{projections.Stock} })
	ctx := context.Background()
	have, err := builds(ctx, pool, live)
	if err != nil {
		t.Fatal(err)
	}
	p := journal.Partition([]byte("MUG"), partitions)
	var tasks [2]*task
	for i := range tasks {
		if tasks[i], err = e.load(ctx, pool, projections.Stock, have[0], p); err != nil {
			t.Fatal(err)
		}
	}
	if err := tasks[0].run(ctx, []int64{1}); err != nil {
		t.Fatal(err)
	}
	if err := tasks[1].run(ctx, []int64{1}); !isCode(err, codeMoved) {
		t.Errorf("the second gets %v", err)
	}
	if n := one[int64](t, pool, "SELECT received FROM wharf_read.stock WHERE sku = 'MUG'"); n != 5 {
		t.Errorf("%d received, want 5", n)
	}
	// Nor does one whose build is no longer live.
	s.tell("MUG", inventory.Received{Quantity: 5})
	if _, err := pool.Exec(ctx, "UPDATE wharf.builds SET state = 'retired'"); err != nil {
		t.Fatal(err)
	}
	if err := tasks[0].run(ctx, []int64{2}); !isCode(err, codeMoved) {
		t.Errorf("a task of a retired build gets %v", err)
	}
	if n := one[int64](t, pool, "SELECT received FROM "+have[0].table()); n != 5 {
		t.Errorf("%d received, want 5", n)
	}
}

func TestAGapHaltsWhatListensToItAndNothingElse(t *testing.T) {
	s := newShop()
	s.order(1, 2)
	id := orderID(1)
	p := journal.Partition([]byte(id), partitions)
	pool := openTest(t)
	e := newEngine(t, pool, s)
	stop := start(t, e)
	s.caughtUp(t, pool)
	before := one[int64](t, pool, "SELECT version FROM wharf_read.orders")

	s.tell(id, orders.ItemReserved{SKU: "before the gap"})
	s.Seqs[projections.OrdersTopic][p]++ // an event is missing
	s.tell(id, orders.ItemReserved{SKU: "behind the gap"})
	s.tell(id, payments.RefundRequested{Amount: pounds(1)}) // another topic
	s.tell("MUG", inventory.Received{Quantity: 5})

	halted := func() (list []string) {
		rows, err := pool.Query(context.Background(), "SELECT model FROM wharf_read.builds WHERE error LIKE '%has a gap%' ORDER BY 1")
		if err != nil {
			t.Fatal(err)
		}
		if list, err = pgx.CollectRows(rows, pgx.RowTo[string]); err != nil {
			t.Fatal(err)
		}
		return list
	}
	want := []string{"history", "orders", "sales"}
	eventually(t, "what listens to orders halts", func() bool { return slices.Equal(halted(), want) })
	eventually(t, "the others go on", func() bool {
		return one[int64](t, pool, "SELECT open_intents FROM wharf_read.payments") == 1 &&
			one[int64](t, pool, "SELECT count(*) FROM wharf_read.stock WHERE sku = 'MUG'") == 1
	})
	if v := one[int64](t, pool, "SELECT version FROM wharf_read.orders"); v != before+1 {
		t.Errorf("the order is at version %d, want %d: all before the gap, nothing behind it", v, before+1)
	}
	// Started anew, it is still halted; a replay meets the same gap, and leaves the live build alone.
	stop()
	stop = start(t, newEngine(t, pool, s))
	eventually(t, "it halts again", func() bool { return slices.Equal(halted(), want) })
	err := e.Replay(context.Background(), []string{"orders"}, ReplayOptions{}, func(Progress) {})
	if err == nil || !strings.Contains(err.Error(), "has a gap") {
		t.Errorf("a replay across a gap says %v", err)
	}
	if n := one[int64](t, pool, "SELECT count(*) FROM wharf.builds"); n != int64(len(e.Models)) {
		t.Errorf("there are %d builds, want %d", n, len(e.Models))
	}
	// When the topic has been restored, it goes on, and says so although there is nothing new.
	stop()
	mended := newShop()
	mended.order(1, 2)
	mended.tell(id, orders.ItemReserved{SKU: "before the gap"})
	mended.tell(id, payments.RefundRequested{Amount: pounds(1)}) // which may have been read by now
	mended.tell("MUG", inventory.Received{Quantity: 5})
	start(t, newEngine(t, pool, mended))
	eventually(t, "nothing is halted any more", func() bool { return len(halted()) == 0 })
	mended.tell(id, orders.ItemReserved{SKU: "behind where the gap was"})
	eventually(t, "the order goes on", func() bool { return one[int64](t, pool, "SELECT version FROM wharf_read.orders") == before+2 })
}

func TestWhatNobodyCanReadIsLeftOutAndCounted(t *testing.T) {
	s := newShop()
	id := orderID(1)
	p := journal.Partition([]byte(id), partitions)
	s.tell(id, orders.Placed{Customer: "C", Total: pounds(5)})
	s.raw(projections.OrdersTopic, id, (projections.Unreadable{}).EventName(), "")
	s.raw(projections.OrdersTopic, id, "order.painted.v1", `{"colour": "red"}`) // of a later version: ignored
	s.append(projections.OrdersTopic, journal.Record{Partition: p, Key: []byte("x"), Value: []byte("not ours")})
	s.raw(projections.OrdersTopic, "no uuid", "order.placed.v1", `{"customer": "D"}`)
	s.raw(projections.InventoryTopic, "MUG\x00", "stock.received.v1", `{"quantity": 1}`)
	s.tell(id, orders.Cancelled{Reason: "changed my mind"})
	pool := openTest(t)
	start(t, newEngine(t, pool, s))
	s.caughtUp(t, pool)
	if got := one[string](t, pool, "SELECT status || ': ' || reason FROM wharf_read.orders"); got != "cancelled: changed my mind" {
		t.Errorf("the order is %s", got)
	}
	got := one[string](t, pool, "SELECT string_agg(type || ' ' || version || ' ' || (data::text = 'null'), ', ' ORDER BY version) FROM wharf_read.history")
	if want := "order.placed.v1 1 false, wharf.unreadable.v1 2 true, order.cancelled.v1 4 false"; got != want {
		t.Errorf("the history is %s, want %s", got, want)
	}
	for model, want := range map[string]int64{"orders": 2, "history": 3, "stock": 1, "payments": 0} {
		if n := one[int64](t, pool, "SELECT sum(skipped)::bigint FROM wharf_read.builds WHERE model = $1", model); n != want {
			t.Errorf("%s has left out %d, want %d", model, n, want)
		}
	}
	if n := one[int64](t, pool, "SELECT count(*) FROM wharf_read.builds WHERE error <> '' OR parked > 0"); n != 0 {
		t.Errorf("%d tasks are halted or have parked events", n)
	}
}

func TestARowOfAnotherPartitionHaltsItsTask(t *testing.T) {
	s := newShop()
	r := s.Next(projections.ShippingTopic, orderID(1), "shipment.created.v1", []byte(`{}`))
	r.Partition = (r.Partition + 1) % partitions
	s.append(r.Topic, journal.NewEventRecord(r))
	pool := openTest(t)
	start(t, newEngine(t, pool, s))
	eventually(t, "the tasks halt", func() bool {
		return one[int64](t, pool, "SELECT count(*) FROM wharf_read.builds WHERE error LIKE '%lives in partition%'") == 2
	})
	if n := one[int64](t, pool, "SELECT count(*) FROM wharf_read.shipments"); n != 0 {
		t.Errorf("there are %d shipments", n)
	}
}

func TestSetUpByManyAtOnce(t *testing.T) {
	s := newShop()
	pool := openTest(t)
	var wg sync.WaitGroup
	for range 5 {
		wg.Go(func() {
			e := New(pool, Config{Source: s.reader, Partitions: partitions})
			if err := e.Setup(context.Background()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := one[int64](t, pool, "SELECT count(*) FROM wharf.builds"); n != int64(len(projections.All)) {
		t.Errorf("there are %d builds, want one a model", n)
	}
	err := New(pool, Config{Source: s.reader, Partitions: partitions + 1}).Setup(context.Background())
	if err == nil || !strings.Contains(err.Error(), "12 partitions") {
		t.Errorf("with another partition count Setup says %v", err)
	}
}

func TestTheQueryRoleReadsViewsAndNothingElse(t *testing.T) {
	s := newShop()
	s.order(1, 2)
	pool := openTest(t)
	e := newEngine(t, pool, s)
	start(t, e)
	s.caughtUp(t, pool)
	ctx := context.Background()
	query, err := OpenQuery(ctx, pool.Config().ConnString())
	if err != nil {
		t.Fatal(err)
	}
	defer query.Close()
	if n := one[int64](t, query, "SELECT count(*) FROM wharf_read.orders"); n != 1 {
		t.Errorf("it sees %d orders", n)
	}
	if _, err := query.Exec(ctx, "SET default_transaction_read_only = off"); err != nil { // the role alone must do
		t.Fatal(err)
	}
	have, err := builds(ctx, pool, live)
	if err != nil {
		t.Fatal(err)
	}
	tables := []string{"wharf.builds", "wharf.tasks", "wharf.migrations"}
	for _, b := range have {
		tables = append(tables, b.table())
	}
	for _, table := range tables {
		if _, err := query.Exec(ctx, "SELECT * FROM "+table); !isCode(err, "42501") {
			t.Errorf("reading %s: %v", table, err)
		}
	}
	for _, sql := range []string{
		"UPDATE wharf_read.orders SET customer = 'me'", "DELETE FROM wharf_read.orders", "DROP VIEW wharf_read.orders",
		"CREATE TABLE wharf_read.mine (id int)", "CREATE TABLE mine (id int)", "CREATE SCHEMA mine",
		"INSERT INTO wharf_read.stock VALUES ('MUG', 1, 1, 1, 1, 1, 1)",
	} {
		if _, err := query.Exec(ctx, "BEGIN; SET TRANSACTION READ WRITE; "+sql+"; COMMIT"); err == nil {
			t.Errorf("it may do this: %s", sql)
		}
	}
}

func TestOpenSaysWhatIsWrong(t *testing.T) {
	if _, err := Open(context.Background(), "postgres://wharf:secret@[::1"); err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("a broken URL: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Open(ctx, "postgres://wharf:secret@127.0.0.1:1/wharf"); err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("no server: %v", err)
	}
}

func TestUnreadableIsTheJournals(t *testing.T) {
	if name := (projections.Unreadable{}).EventName(); name != journal.Unreadable {
		t.Errorf("%s and %s must be the same event", name, journal.Unreadable)
	}
}

func TestAHaltIsLogged(t *testing.T) {
	s := newShop()
	s.Seqs[projections.ShippingTopic][journal.Partition([]byte(orderID(1)), partitions)] = 5
	s.tell(orderID(1), shipping.Created{})
	var log bytes.Buffer
	var mu sync.Mutex
	pool := openTest(t)
	stop := start(t, newEngine(t, pool, s, func(c *Config) {
		c.Logger = slog.New(slog.NewTextHandler(writerFunc(func(p []byte) (int, error) {
			mu.Lock()
			defer mu.Unlock()
			return log.Write(p)
		}), nil))
	}))
	eventually(t, "it is logged", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return strings.Contains(log.String(), "halts")
	})
	stop()
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// countHalts is a log that counts how often a projection is said to halt.
func countHalts(n *atomic.Int64) *slog.Logger {
	return slog.New(slog.NewTextHandler(writerFunc(func(p []byte) (int, error) {
		if strings.Contains(string(p), "a projection halts") {
			n.Add(1)
		}
		return len(p), nil
	}), nil))
}

// A halt that is found before anything is read is said once by each task, and shown.
func TestAHaltThatComesFirstIsShown(t *testing.T) {
	s := newShop()
	s.tell("MUG", inventory.Received{Quantity: 5})
	pool := openTest(t)
	m := shelf(1, new(atomic.Bool))
	stop := start(t, newEngine(t, pool, s, func(c *Config) { c.Models = []projections.Model{m} }))
	s.caughtUp(t, pool)
	stop()
	if _, err := pool.Exec(t.Context(), "UPDATE wharf.tasks SET epoch = epoch + 1"); err != nil { // as a repair does
		t.Fatal(err)
	}
	m.Topics = []string{projections.InventoryTopic, projections.OrdersTopic} // and the version was forgotten
	var halts atomic.Int64
	e := newEngine(t, pool, s, func(c *Config) {
		c.Models = []projections.Model{m}
		c.Logger = countHalts(&halts)
	})
	startIn(t, e, 0, 1)
	eventually(t, "both tasks are shown as halted", func() bool {
		return one[int](t, pool, "SELECT count(*) FROM wharf.tasks WHERE error LIKE '%its version must be raised%'") == 2
	})
	if n := halts.Load(); n != 2 {
		t.Errorf("two tasks said %d times that they halt", n)
	}
}

// A turn that was given in the moment in which its task was stopped is given back.
func TestATurnThatIsNotTakenIsGivenBack(t *testing.T) {
	e := New(nil, Config{Models: []projections.Model{projections.Stock}, Partitions: partitions})
	turns := e.turns[role{"stock", live}]
	for range 50 { // in half of them the task sees first that it is stopped
		ctx, stop := context.WithCancel(t.Context())
		chunks := make(chan chunk, 2)
		for i := range 2 {
			chunks <- chunk{events: make([]arrival, 1), next: int64(i + 1), seq: int64(i + 1)}
		}
		seen := 0
		task := &task{e: e, model: projections.Stock, turns: turns, at: position{offsets: []int64{0}, seqs: []int64{0}}, limits: bulkLimits,
			moved: func(int64, int64) {
				if seen++; seen == 2 { // it has asked for a turn after the first
					for turns.TryAcquire(liveWriters) {
						turns.Release(liveWriters)
						runtime.Gosched()
					}
					stop()
				}
			}}
		if b, err := task.collect(ctx, chunks, nil); err == nil {
			b.turn.end()
		}
	}
	if !turns.TryAcquire(liveWriters) {
		t.Error("not all turns have been given back")
	}
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
		return s.behind(t, looking, free) == 0
	})
}

// behind is how far the live build is behind. It does not read the table.
func (s *shop) behind(t *testing.T, e *Engine, m projections.Model) (n int64) {
	t.Helper()
	b := liveOf(t, e, m.Name)
	for p := range int32(partitions) {
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
