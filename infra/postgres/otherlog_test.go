package postgres

import (
	"context"
	"errors"
	"maps"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"wharf/domain/inventory"
	"wharf/projections"
)

// ids are those of the public topics of one installation.
func ids(installation string) map[string]string {
	all := map[string]string{}
	for _, topic := range projections.Topics {
		all[topic] = topic + " of " + installation
	}
	return all
}

// Positions are those of the topics that a build was made of. In another Kafka, or after a topic was made anew, they mean
// nothing, however long it is: nobody goes on from there, and who asks for more than nothing is not told that it is there.
func TestRowsOfTwoLogsAreNotMixed(t *testing.T) {
	with := func(of map[string]string) func(*Config) {
		return func(c *Config) {
			c.Models, c.TopicIDs = []projections.Model{projections.Stock, projections.Sales}, of
		}
	}
	first := newShop()
	first.tell("MUG", inventory.Received{Quantity: 5})
	pool, _ := first.projected(t, with(ids("the first")))

	second := newShop() // longer than the first
	var at = second.tell("MUG", inventory.Received{Quantity: 1})
	for range 5 {
		at = second.tell("MUG", inventory.Received{Quantity: 1})
	}
	anew := ids("the first")
	anew[projections.InventoryTopic] = "made anew"
	var said atomic.Int64
	e := newEngine(t, openURL(t, pool.Config().ConnString()), second, with(anew), func(c *Config) { c.Logger = countHalts(&said) })
	stop := start(t, e)
	eventually(t, "it is said in the log", func() bool { return said.Load() > 0 })
	status, err := projections.ReadStatus(t.Context(), pool, otherLags{testLags{second}, anew})
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range status.Items {
		if b.Name != "stock" && b.Name != "sales" {
			continue
		}
		if other := b.Name == "stock"; other != (b.State == projections.StateHalted) || other != strings.Contains(b.Error, "another topic inventory.events") || other != (b.Lag == 6) {
			t.Errorf("%s is %s, %d behind: %s", b.Name, b.State, b.Lag, b.Error)
		}
	}
	// But who has the right Kafka need not see it.
	if n := one[int](t, pool, "SELECT count(*) FROM wharf.tasks WHERE error <> ''"); n > 0 {
		t.Errorf("%d tasks are shown to be halted", n)
	}
	units := "SELECT received FROM wharf_read.stock WHERE sku = 'MUG'"
	if n := one[int](t, pool, units); n != 5 {
		t.Errorf("%d were received", n)
	}
	positions := NewPositions(pool)
	positions.TopicIDs = anew
	behind := new(projections.BehindError)
	at.Seq = 1
	if err := positions.Wait(t.Context(), "stock", at, 0); !errors.As(err, &behind) || !behind.Halted || behind.Seen != 0 {
		t.Errorf("what was made anew is there: %v", err)
	}
	for what, do := range map[string]func() error{
		"a replay": func() error { return e.Replay(t.Context(), []string{"stock"}, ReplayOptions{}, func(Progress) {}) },
		"a plan":   func() error { _, err := e.Plan(t.Context(), []string{"stock"}); return err },
		"a repair": func() error {
			_, err := e.load(t.Context(), pool, projections.Stock, liveOf(t, e, "stock"), 0)
			return err
		},
		"a compare": func() error { return e.Verify(t.Context(), []string{"stock"}, func(Progress) {}, func(Comparison) {}) },
	} {
		if err := do(); err == nil || !strings.Contains(err.Error(), "another Kafka, or the topic was made anew") {
			t.Errorf("%s says %v", what, err)
		}
	}
	stop()

	// By force the build is made of what there is, and the one before is none to go back to.
	stop = start(t, e)
	if err := e.Replay(t.Context(), []string{"stock"}, ReplayOptions{Force: true, Lost: true}, func(Progress) {}); err != nil {
		t.Fatal(err)
	}
	second.tell("MUG", inventory.Received{Quantity: 1})
	eventually(t, "it goes on", func() bool { return one[int](t, pool, units) == 7 })
	if err := positions.Wait(t.Context(), "stock", at, time.Minute); err != nil {
		t.Error(err)
	}
	if err := e.Rollback(t.Context(), "stock", func(Progress) {}); err == nil || !strings.Contains(err.Error(), "another topic inventory.events") {
		t.Errorf("a rollback says %v", err)
	}
	// Who does not know which of the two is right does not go back either.
	ignorant := New(pool, Config{Models: e.Models, Partitions: partitions, Source: e.Source})
	if err := ignorant.Rollback(t.Context(), "stock", func(Progress) {}); err == nil || !strings.Contains(err.Error(), "Kafka is away") {
		t.Errorf("a rollback without Kafka says %v", err)
	}
	stop()
	// But whoever has the first log back does, or builds it anew; and back again, to what the second has made, goes nobody.
	first.tell("MUG", inventory.Received{Quantity: 1})
	restored := newEngine(t, openURL(t, pool.Config().ConnString()), first, with(ids("the first")))
	start(t, restored)
	if err := restored.Rollback(t.Context(), "stock", func(Progress) {}); err != nil {
		t.Error(err)
	}
	eventually(t, "the build of the first log goes on", func() bool { return one[int](t, pool, units) == 6 })
	if err := restored.Rollback(t.Context(), "stock", func(Progress) {}); err == nil || !strings.Contains(err.Error(), "another topic inventory.events") {
		t.Errorf("a rollback to another log says %v", err)
	}
	if err := restored.Replay(t.Context(), []string{"stock"}, ReplayOptions{Force: true, Lost: true}, func(Progress) {}); err != nil {
		t.Error(err)
	}
	if n := one[int](t, pool, units); n != 6 {
		t.Errorf("with the first log %d were received", n)
	}
}

// What was given up of one log is not missing from another, and is given up by who has the right one.
func TestWhatWasGivenUpIsOfOneLog(t *testing.T) {
	of := func(ids map[string]string) func(*Config) {
		return func(c *Config) { c.Models, c.TopicIDs = []projections.Model{projections.Stock}, ids }
	}
	first := newShop()
	first.tell("MUG", inventory.Received{Quantity: 5})
	first.raw(projections.InventoryTopic, "MUG", "stock.received.v1", `{"quantity": broken`)
	first.tell("MUG", inventory.Received{Quantity: 1})
	pool, e := first.projected(t, of(ids("the first")))
	parked, err := e.Parked(t.Context(), "stock")
	if err != nil || len(parked) != 2 {
		t.Fatal(parked, err)
	}
	second := newShop()
	second.tell("MUG", inventory.Received{Quantity: 1})
	second.tell("MUG", inventory.Received{Quantity: 1})
	other := New(pool, Config{Models: e.Models, Partitions: partitions, Source: second.reader, TopicIDs: ids("the second"), Logger: e.Logger})
	if err := other.DiscardParked(t.Context(), "stock", parked[0].Position); !errors.Is(err, errOtherLog) {
		t.Errorf("given up with the wrong Kafka: %v", err)
	}
	if err := e.DiscardParked(t.Context(), "stock", parked[0].Position); err != nil {
		t.Fatal(err)
	}
	if c := verify(t, e, 0); c.Discarded != 1 {
		t.Errorf("%d were given up", c.Discarded)
	}
	if err := other.Replay(t.Context(), []string{"stock"}, ReplayOptions{Force: true, Lost: true}, func(Progress) {}); err != nil {
		t.Fatal(err)
	}
	if n := one[int](t, pool, "SELECT received FROM wharf_read.stock WHERE sku = 'MUG'"); n != 2 {
		t.Errorf("%d of 2 were received", n)
	}
	// What waits in the build of the first log is nobody's concern.
	if done, err := other.RetryParked(t.Context(), "stock", ""); err != nil || done != (Repaired{}) {
		t.Errorf("retried: %+v, %v", done, err)
	}
	if list, err := other.DiscardedEvents(t.Context(), ""); err != nil || len(list) > 0 {
		t.Errorf("given up of the second: %v, %v", list, err)
	}
}

// A query service that is older than its projector looks at ids when there are some.
func TestIDsAreLookedAtWhenThereAreSome(t *testing.T) {
	s := newShop()
	at := s.tell("MUG", inventory.Received{Quantity: 5})
	pool, _ := s.projected(t, func(c *Config) { c.Models, c.TopicIDs = []projections.Model{projections.Stock}, ids("the first") })
	view := one[string](t, pool, "SELECT pg_get_viewdef('wharf_read.builds'::regclass)")
	make := func(view string) {
		t.Helper()
		if _, err := pool.Exec(t.Context(), "DROP VIEW wharf_read.builds; CREATE VIEW wharf_read.builds AS "+view); err != nil {
			t.Fatal(err)
		}
	}
	make(strings.Replace(view, ",\n    b.topic_ids", "", 1))
	p := NewPositions(pool)
	p.TopicIDs = ids("the second")
	if err := p.Wait(t.Context(), "stock", at, time.Minute); err != nil {
		t.Fatal(err)
	}
	make(view)
	p.older = p.older.Add(-olderFor)
	eventually(t, "it sees that the build is of another log", func() bool {
		return errors.As(p.Wait(t.Context(), "stock", at, 0), new(*projections.BehindError))
	})
}

// otherLags is testLags on topics with ids.
type otherLags struct {
	testLags
	ids map[string]string
}

func (l otherLags) TopicIDs() map[string]string { return l.ids }

func liveOf(t *testing.T, e *Engine, model string) build {
	t.Helper()
	b, _, err := buildIn(context.Background(), e.pool, role{model, live})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// A database of a program that did not ask for ids is taken for one of the topics that there are.
func TestWhatHasNoIdsGetsThem(t *testing.T) {
	s := newShop()
	s.stock(3)
	pool, _ := s.projected(t)
	none := map[string]string{} // of a cluster that gives none
	for _, topic := range projections.Topics {
		none[topic] = ""
	}
	if err := s.projectedBy(t, pool, func(c *Config) { c.TopicIDs = none }).
		Replay(t.Context(), []string{"stock"}, ReplayOptions{}, func(Progress) {}); err != nil {
		t.Fatal(err)
	}
	if _, err := pool.Exec(t.Context(), "INSERT INTO wharf.discarded (model, partition, topic, seq) VALUES ('stock', 0, $1, 100)", projections.InventoryTopic); err != nil {
		t.Fatal(err)
	}
	s.projectedBy(t, pool, func(c *Config) { c.TopicIDs = ids("the first") })
	if id := one[string](t, pool, "SELECT topic_id FROM wharf.discarded"); id != ids("the first")[projections.InventoryTopic] {
		t.Errorf("an event of topic %q was given up", id)
	}
	b := liveOf(t, &Engine{pool: pool}, "stock")
	if !maps.Equal(b.ids(), map[string]string{projections.InventoryTopic: ids("the first")[projections.InventoryTopic]}) {
		t.Errorf("stock was made of %v", b.ids())
	}
}

// A build that has halted is none to go back to, and neither is one whose table is gone or that has lost a task; nor is there a way
// back while the log ends before what the live one has read.
func TestNoRollbackToWhatIsBroken(t *testing.T) {
	s := newShop()
	s.stock(10)
	pool, e := s.projected(t)
	quiet := func(Progress) {}
	if err := e.Replay(t.Context(), []string{"stock"}, ReplayOptions{}, quiet); err != nil {
		t.Fatal(err)
	}
	exec := func(sql string) {
		t.Helper()
		if _, err := pool.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	before := one[time.Time](t, pool, "SELECT keep_until FROM wharf.builds WHERE model = 'stock' AND state = 'previous'")
	exec("UPDATE wharf.tasks SET error = 'a gap' WHERE build = (SELECT id FROM wharf.builds WHERE model = 'stock' AND state = 'previous') AND partition = 0")
	if err := e.Rollback(t.Context(), "stock", quiet); err == nil || !strings.Contains(err.Error(), "is halted: partition 0: a gap") {
		t.Errorf("to a halted one: %v", err)
	}
	if now := one[time.Time](t, pool, "SELECT keep_until FROM wharf.builds WHERE model = 'stock' AND state = 'previous'"); !now.Equal(before) {
		t.Error("a rollback that was refused keeps the previous build for longer")
	}
	exec("UPDATE wharf.tasks SET error = ''")
	// The live one has read what the log has lost, or what its leader does not know yet: rows would be missing.
	exec("UPDATE wharf.tasks SET offsets = '{1000}', seqs = '{1000}' WHERE build = (SELECT id FROM wharf.builds WHERE model = 'stock' AND state = 'live') AND partition = 0")
	if err := e.Rollback(t.Context(), "stock", quiet); err == nil || !strings.Contains(err.Error(), "the log ends at") {
		t.Errorf("from one that is beyond the end: %v", err)
	}
	exec("DELETE FROM wharf.tasks WHERE build = (SELECT id FROM wharf.builds WHERE model = 'stock' AND state = 'previous') AND partition = 0")
	if err := e.Rollback(t.Context(), "stock", quiet); err == nil || !strings.Contains(err.Error(), "only 11 rows in wharf.tasks") {
		t.Errorf("to one that has lost a task: %v", err)
	}
	// Nor does a start go back to it.
	exec("DROP TABLE " + liveOf(t, e, "stock").table() + " CASCADE")
	old := one[int64](t, pool, "SELECT id FROM wharf.builds WHERE model = 'stock' AND state = 'previous'")
	if err := e.Setup(t.Context()); err != nil || liveOf(t, e, "stock").id == old {
		t.Errorf("a start went back to what has lost a task: %v", err)
	}
	if err := e.Replay(t.Context(), []string{"stock"}, ReplayOptions{Force: true}, quiet); err != nil {
		t.Fatal(err)
	}
	exec("DROP TABLE " + Table("stock", one[int64](t, pool, "SELECT id FROM wharf.builds WHERE model = 'stock' AND state = 'previous'")))
	if err := e.Rollback(t.Context(), "stock", quiet); err == nil || !strings.Contains(err.Error(), "is gone") {
		t.Errorf("to one without a table: %v", err)
	}
}

// A live build of which something is missing is named, and does not keep the others from being verified.
func TestAVerificationSaysWhatIsMissing(t *testing.T) {
	s := newShop()
	s.stock(10)
	s.order(1, 1)
	pool, e := s.projected(t)
	exec := func(sql string) {
		t.Helper()
		if _, err := pool.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	exec("DROP VIEW wharf_read.sales")
	exec("DROP TABLE " + Table("ledger", liveOf(t, e, "ledger").id) + " CASCADE")
	exec("DROP TABLE " + Table("payments", liveOf(t, e, "payments").id) + " CASCADE")
	exec("DELETE FROM wharf.tasks t USING wharf.builds b WHERE b.id = build AND model = 'orders' AND partition = 1")
	exec("DELETE FROM wharf.tasks t USING wharf.builds b WHERE b.id = build AND model = 'shipments'")
	said := map[string]string{}
	err := e.Verify(t.Context(), allNames(e), func(Progress) {}, func(c Comparison) { said[c.Model] = c.Unread })
	if err == nil || !strings.Contains(err.Error(), "verify orders: the live build has only 11 rows in wharf.tasks for 12 partitions") {
		t.Errorf("of a lost task it says %v", err)
	}
	if len(said) != len(e.Models)-2 || !strings.Contains(said["sales"], "the view wharf_read") || !strings.Contains(said["ledger"], "dropped its table") || said["stock"] != "" {
		t.Errorf("it says %v", said)
	}
	status, err := projections.ReadStatus(t.Context(), pool, testLags{s})
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range status.Items {
		gone := strings.Contains("sales ledger payments", b.Name)
		if gone != strings.Contains(b.Error, "its table or its view is gone") || (b.State == projections.StateHalted) != (gone || b.Name == "orders" || b.Name == "shipments") {
			t.Errorf("%s is %s: %q", b.Name, b.State, b.Error)
		}
	}
	// A replay mends a view, and by force what has no rows.
	if err := e.Replay(t.Context(), []string{"sales"}, ReplayOptions{}, func(Progress) {}); err != nil {
		t.Error(err)
	}
	if err := e.Replay(t.Context(), []string{"orders", "shipments", "ledger", "payments"}, ReplayOptions{Force: true, Lost: true}, func(Progress) {}); err != nil {
		t.Error(err)
	}
	verifyAll := e.Verify(t.Context(), allNames(e), func(Progress) {}, func(c Comparison) {
		if !c.Same() || c.Unread != "" {
			t.Error(c.String())
		}
	})
	if verifyAll != nil {
		t.Error(verifyAll)
	}
}

// A new version replaces even a live build that has lost a task.
func TestANewVersionReplacesWhatHasLostATask(t *testing.T) {
	older, newer := projections.Stock, projections.Stock
	newer.Version++
	s := newShop()
	s.stock(40)
	pool, e := s.projected(t, func(c *Config) { c.Models = []projections.Model{older} })
	if _, err := pool.Exec(t.Context(), "DELETE FROM wharf.tasks WHERE build = $1 AND partition = 0", liveOf(t, e, "stock").id); err != nil {
		t.Fatal(err)
	}
	start(t, newEngine(t, pool, s, func(c *Config) { c.Models = []projections.Model{newer} }))
	eventually(t, "the new version is live", func() bool { return liveOf(t, e, "stock").version == newer.Version })
}

// When the table of the live build is gone, a start goes back to the previous one, which has all rows.
func TestATableThatIsGoneBringsThePreviousBack(t *testing.T) {
	s := newShop()
	s.stock(40)
	pool, e := s.projected(t)
	want := rowsOf(t, projections.Stock, pool)
	if err := e.Replay(t.Context(), []string{"stock"}, ReplayOptions{}, func(Progress) {}); err != nil {
		t.Fatal(err)
	}
	if _, err := pool.Exec(t.Context(), "UPDATE wharf.tasks SET error = 'which may be mended' WHERE partition = 0"); err != nil {
		t.Fatal(err)
	}
	if _, err := pool.Exec(t.Context(), "DROP TABLE "+Table("stock", liveOf(t, e, "stock").id)+" CASCADE"); err != nil {
		t.Fatal(err)
	}
	if err := e.Setup(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := rowsOf(t, projections.Stock, pool); !maps.Equal(got, want) {
		t.Errorf("there are %d rows of %d", len(got), len(want))
	}
}

// A row that only an index refuses is parked, by a replay as by live projection.
func TestARowThatAnIndexRefusesIsParkedByAReplay(t *testing.T) {
	s := newShop()
	s.order(1, 1)
	s.raw(projections.OrdersTopic, orderID(3), "order.placed.v1", `[]`)
	s.raw(projections.OrdersTopic, orderID(4), "wharf.unreadable.v1", `{}`)
	s.raw(projections.OrdersTopic, orderID(2), "order.placed.v1",
		`{"customer": "`+incompressible(6000)+`", "lines": [], "total": {"amount": 1, "currency": "GBP"}}`)
	pool, e := s.projected(t, func(c *Config) { c.Models = []projections.Model{projections.Orders} })
	verify(t, e, 0)
	const skipped = "SELECT sum(skipped)::bigint FROM wharf.tasks t JOIN wharf.builds b ON b.id = build WHERE state = 'live'"
	before := one[int64](t, pool, skipped)
	var last Progress
	if err := e.Replay(t.Context(), []string{"orders"}, ReplayOptions{}, func(p Progress) { last = p }); err != nil {
		t.Fatal(err)
	}
	if last.Done != last.Total || last.PartitionsDone != partitions {
		t.Errorf("it ends at %d of %d records, %d partitions", last.Done, last.Total, last.PartitionsDone)
	}
	if n := one[int](t, pool, "SELECT count(*) FROM wharf.parked k JOIN wharf.builds b ON b.id = k.build WHERE state = 'live'"); n != 2 {
		t.Errorf("%d events are parked", n)
	}
	if after := one[int64](t, pool, skipped); after != before {
		t.Errorf("%d records are left out, and were %d", after, before)
	}
}

// In another Kafka all topics are other ones: that is said once a read model.
func TestAnotherKafkaIsSaidOnce(t *testing.T) {
	s := newShop()
	pool, _ := s.projected(t, func(c *Config) { c.TopicIDs = ids("the first") })
	status, err := projections.ReadStatus(t.Context(), pool, otherLags{testLags{s}, ids("the second")})
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range status.Items {
		if n := strings.Count(b.Error, "another topic"); n != 1 {
			t.Errorf("%s says it %d times: %s", b.Name, n, b.Error)
		}
	}
}
