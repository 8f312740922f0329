package postgres

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	"wharf/domain"
	"wharf/domain/inventory"
	"wharf/domain/orders"
	"wharf/infra/journal"
	"wharf/projections"
)

type shelfKey struct {
	SKU string `db:"sku text"`
}

type shelfRow struct {
	Units int64  `db:"units int"` // which is smaller than what it is given
	Last  string `db:"last varchar(20)"`
}

// shelf is a read model that fails on adjustments by 13, as long as it is broken.
func shelf(version int, broken *atomic.Bool) projections.Model {
	return projections.Define(projections.Spec[shelfKey, shelfRow]{
		Name: "shelf", Version: version,
		Events: map[string]domain.Events{projections.InventoryTopic: inventory.Events},
		Keys:   func(e projections.Event) []shelfKey { return []shelfKey{{e.Stream}} },
		Apply: func(_ shelfKey, r shelfRow, e projections.Event) shelfRow {
			switch f := e.Fact.(type) {
			case inventory.Received:
				r.Units += f.Quantity
			case inventory.Adjusted:
				if f.Delta == 13 && broken.Load() {
					panic("no idea: \x00\xc3") // which Postgres does not take for text
				}
				r.Units += f.Delta
				r.Last = f.Reason
			}
			return r
		},
	})
}

// brokenShelf is a shop that is projected by a shelf that is broken: the event at the position is parked.
func brokenShelf(t *testing.T) (e *Engine, broken *atomic.Bool, at domain.Position) {
	t.Helper()
	broken = new(atomic.Bool)
	broken.Store(true)
	s := newShop()
	s.tell("MUG", inventory.Received{Quantity: 5})
	at = s.tell("MUG", inventory.Adjusted{Delta: 13, Reason: "x"})
	pool := openTest(t)
	e = newEngine(t, pool, s, func(c *Config) { c.Models = []projections.Model{shelf(1, broken)} })
	start(t, e)
	s.caughtUp(t, pool)
	return e, broken, at
}

func shelves(t *testing.T, e *Engine) string {
	return one[string](t, e.pool, `SELECT coalesce(string_agg(sku || ' ' || units || ' ' || last || CASE WHEN stale THEN ' stale' ELSE '' END,
		', ' ORDER BY sku), '') FROM wharf_read.shelf`)
}

// An event that cannot be applied waits, and with it what comes after it on its stream, while everything else goes on.
// Once the program is mended they are applied in their order, and nothing tells the rows from others.
func TestAPoisonousEventIsParkedAndNothingElse(t *testing.T) {
	var broken atomic.Bool
	broken.Store(true)
	m := shelf(1, &broken)
	s := newShop()
	s.tell("MUG", inventory.Received{Quantity: 5})
	s.tell("MUG", inventory.Adjusted{Delta: 13, Reason: "first"})
	s.tell("MUG", inventory.Adjusted{Delta: 1, Reason: "second"})
	s.raw(projections.InventoryTopic, "CUP", "stock.received.v1", `{"quantity": broken`)
	s.tell("CUP", inventory.Received{Quantity: 7})
	s.tell("POT", inventory.Received{Quantity: 3})
	pool := openTest(t)
	with := func(c *Config) { c.Models = []projections.Model{m} }
	e := newEngine(t, pool, s, with)
	stop := start(t, e)
	s.caughtUp(t, pool)
	want := "MUG 5  stale, POT 3 "
	if got := shelves(t, e); got != want {
		t.Errorf("the shelves are %q, want %q", got, want)
	}
	// It still waits after a restart.
	stop()
	start(t, e)
	s.tell("MUG", inventory.Adjusted{Delta: -2, Reason: "third"})
	s.tell("POT", inventory.Received{Quantity: 1})
	s.caughtUp(t, pool)
	if got := shelves(t, e); got != "MUG 5  stale, POT 4 " {
		t.Errorf("the shelves are %q", got)
	}
	list, err := e.Parked(t.Context(), "shelf")
	if err != nil {
		t.Fatal(err)
	}
	var told []string
	for _, p := range list {
		told = append(told, fmt.Sprintf("%s %s %v", p.Stream, p.Name, p.Error != ""))
	}
	wantTold := []string{"MUG stock.adjusted.v1 true", "MUG stock.adjusted.v1 false", "MUG stock.adjusted.v1 false",
		"CUP stock.received.v1 true", "CUP stock.received.v1 false"}
	if diff := cmp.Diff(sorted(wantTold), sorted(told)); diff != "" {
		t.Errorf("parked (-want +got):\n%s", diff)
	}
	// A verification with the same program parks the same, and compares the rest.
	verify(t, e, 0)

	// A retry that fails changes nothing.
	done, err := e.RetryParked(t.Context(), "shelf", "")
	if err != nil || done != (Repaired{Applied: 0, Waiting: 5}) {
		t.Errorf("retried in vain: %+v, %v", done, err)
	}
	// Mended, one stream alone, while the projector runs.
	broken.Store(false)
	if done, err = e.RetryParked(t.Context(), "shelf", "MUG"); err != nil || done.Applied != 3 {
		t.Errorf("retried: %+v, %v", done, err)
	}
	s.tell("MUG", inventory.Adjusted{Delta: 4, Reason: "fourth"})
	s.caughtUp(t, pool)
	if got := shelves(t, e); got != "MUG 21 fourth, POT 4 " {
		t.Errorf("the shelves are %q", got)
	}
	// What nobody will ever read is given up, and what waited for it is applied.
	cup := ""
	for _, p := range list {
		if p.Stream == "CUP" && p.Error != "" {
			cup = p.Position
		}
	}
	if err := e.DiscardParked(t.Context(), "shelf", cup); err != nil {
		t.Fatal(err)
	}
	if err := e.DiscardParked(t.Context(), "shelf", cup); err != nil {
		t.Errorf("discarded twice: %v", err)
	}
	if err := e.DiscardParked(t.Context(), "shelf", "inventory.events/0/99"); !errors.Is(err, ErrNotParked) {
		t.Errorf("discarded what is not parked: %v", err)
	}
	if done, err = e.RetryParked(t.Context(), "shelf", ""); err != nil || done != (Repaired{Applied: 1, Waiting: 0}) {
		t.Errorf("retried: %+v, %v", done, err)
	}
	if got := shelves(t, e); got != "CUP 7 , MUG 21 fourth, POT 4 " {
		t.Errorf("the shelves are %q", got)
	}
	// The log tells the same, also what was given up.
	verify(t, e, 0)
	if err := e.Replay(t.Context(), []string{"shelf"}, ReplayOptions{}, func(Progress) {}); err != nil {
		t.Error(err)
	}
	if got := shelves(t, e); got != "CUP 7 , MUG 21 fourth, POT 4 " {
		t.Errorf("after a replay the shelves are %q", got)
	}
	givenUp, err := e.DiscardedEvents(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	if row, err := e.AsOf(t.Context(), "shelf", "CUP", nil, givenUp); err != nil || row.Events != 1 {
		t.Errorf("the row by itself: %+v, %v", row, err)
	}
}

func sorted(s []string) map[string]int {
	counts := map[string]int{}
	for _, v := range s {
		counts[v]++
	}
	return counts
}

// verify has the live builds verified, and wants so many differences.
func verify(t *testing.T, e *Engine, want int64) (c Comparison) {
	t.Helper()
	if err := e.Verify(t.Context(), allNames(e), func(Progress) {}, func(one Comparison) {
		if one.Differences() != want {
			t.Errorf("want %d differences: %s", want, one.String())
		}
		c = one
	}); err != nil {
		t.Error(err)
	}
	return c
}

// Of a batch that the table refuses only the event that is at fault is parked, in live projection and in a replay.
func TestOneEventWhoseRowIsRefusedIsParked(t *testing.T) {
	for _, copied := range []int{1, 1000} {
		t.Run(fmt.Sprintf("COPY from %d rows on", copied), func(t *testing.T) { oneEventIsRefused(t, copied) })
	}
}

func oneEventIsRefused(t *testing.T, copied int) {
	var broken atomic.Bool
	m := shelf(1, &broken)
	s := newShop()
	for i := range 20 {
		s.tell(fmt.Sprint("SKU", i), inventory.Received{Quantity: 5})
	}
	s.tell("SKU3", inventory.Received{Quantity: 1 << 40})
	s.tell("SKU3", inventory.Received{Quantity: 1})
	s.tell("SKU4", inventory.Adjusted{Delta: 1, Reason: "found"})
	s.tell("SKU5", inventory.Adjusted{Delta: 1, Reason: "more than twenty characters"})
	pool, e := s.projected(t, func(c *Config) { c.Models, c.Copy = []projections.Model{m}, copied })
	check := func(when string) {
		t.Helper()
		if n := one[int64](t, pool, "SELECT sum(units)::bigint FROM wharf_read.shelf"); n != 101 {
			t.Errorf("%s: %d units, want 101", when, n)
		}
		list, err := e.Parked(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		var errs []string
		for _, p := range list {
			if p.State == live {
				errs = append(errs, fmt.Sprintf("%s %v", p.Stream, strings.Contains(p.Error, "cannot hold a row")))
			}
		}
		if diff := cmp.Diff([]string{"SKU3 true", "SKU3 false", "SKU5 true"}, errs); diff != "" {
			t.Errorf("%s: parked (-want +got):\n%s", when, diff)
		}
	}
	check("live")
	if err := e.Replay(t.Context(), []string{"shelf"}, ReplayOptions{}, func(Progress) {}); err != nil {
		t.Error(err)
	}
	check("replayed")
	if done, err := e.RetryParked(t.Context(), "shelf", "SKU3"); err != nil || done.Applied != 0 {
		t.Errorf("retried: %+v, %v", done, err)
	}
	check("retried")
}

// What is too long for an index, of the table and of parked events alike, is parked all the same.
func TestAKeyThatNoIndexTakesIsParked(t *testing.T) {
	random := make([]byte, 4500)
	_, _ = rand.NewChaCha8([32]byte{}).Read(random)
	long := base64.StdEncoding.EncodeToString(random)
	s := newShop()
	s.tell(long, inventory.Received{Quantity: 5})
	s.tell(long+"!", inventory.Received{Quantity: 5})
	s.tell(long, inventory.Received{Quantity: 5})
	for i := range 50 {
		s.tell(fmt.Sprint("SKU", i), inventory.Received{Quantity: 1})
	}
	pool, e := s.projected(t, func(c *Config) { c.Models = []projections.Model{projections.Stock} })
	check := func(when string) {
		t.Helper()
		if n := one[int64](t, pool, "SELECT sum(received)::bigint FROM wharf_read.stock"); n != 50 {
			t.Errorf("%s: %d units, want 50", when, n)
		}
		if n := one[int64](t, pool, "SELECT count(*) FROM wharf.parked JOIN wharf.builds b ON b.id = build WHERE b.state = 'live'"); n != 3 {
			t.Errorf("%s: %d events are parked, want 3", when, n)
		}
	}
	check("live")
	if err := e.Replay(t.Context(), []string{"stock"}, ReplayOptions{}, func(Progress) {}); err != nil {
		t.Error(err)
	}
	check("replayed")
}

// A halt is the end of it, also when it says that something was refused.
func TestAHaltIsNoRefusal(t *testing.T) {
	s := newShop()
	s.tell("SKU", inventory.Received{Quantity: 5})
	pool := openTest(t)
	e := newEngine(t, pool, s, func(c *Config) { c.Models = []projections.Model{projections.Stock} })
	for _, sql := range []string{"ALTER TABLE wharf.parked ADD CHECK (false)", "ALTER TABLE wharf_build_1.stock ADD CHECK (false)"} {
		if _, err := pool.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	start(t, e)
	eventually(t, "the task is halted", func() bool {
		return strings.Contains(one[string](t, pool, "SELECT string_agg(error, '') FROM wharf.tasks"), "an event cannot be parked")
	})
}

// An event of several rows is applied to all of them or none: they wait together.
func TestAnEventOfSeveralRowsIsParkedAsAWhole(t *testing.T) {
	type key struct {
		Partition int32  `db:"partition int"`
		Kind      string `db:"kind text"`
	}
	type row struct {
		N int64 `db:"n bigint"`
	}
	m := projections.Define(projections.Spec[key, row]{
		Name: "kinds", Version: 1,
		Events: map[string]domain.Events{projections.InventoryTopic: inventory.Events},
		Keys: func(e projections.Event) []key {
			if f, ok := e.Fact.(inventory.Adjusted); ok {
				return []key{{e.Partition, "all"}, {e.Partition, f.Reason}}
			}
			return []key{{e.Partition, "all"}}
		},
		Apply: func(k key, r row, e projections.Event) row {
			if k.Kind == "bad" {
				panic("no idea")
			}
			return row{r.N + 1}
		},
	})
	s := newShop()
	s.tell("MUG", inventory.Received{Quantity: 5})
	s.tell("MUG", inventory.Adjusted{Delta: 1, Reason: "bad"})
	pool := openTest(t)
	e := newEngine(t, pool, s, func(c *Config) { c.Models = []projections.Model{m} })
	start(t, e)
	s.caughtUp(t, pool)
	if got := one[string](t, pool, "SELECT string_agg(kind || ' ' || n || ' ' || stale, ', ') FROM wharf_read.kinds"); got != "all 1 true" {
		t.Errorf("the rows are %s", got)
	}
}

// So many parked events are no exception any more: the task halts, having stored what it parked, and goes on by itself once
// they are repaired.
func TestParkingIsBounded(t *testing.T) {
	var broken atomic.Bool
	broken.Store(true)
	s := newShop()
	at := s.tell("MUG", inventory.Adjusted{Delta: 13, Reason: "first"})
	for range 9 {
		s.tell("MUG", inventory.Adjusted{Delta: 1, Reason: "more"})
	}
	pool := openTest(t)
	e := newEngine(t, pool, s, func(c *Config) { c.Models, c.Park = []projections.Model{shelf(1, &broken)}, 5 })
	start(t, e)
	eventually(t, "it halts", func() bool {
		return one[int64](t, pool, "SELECT count(*) FROM wharf_read.builds WHERE error LIKE '%events are parked%'") == 1
	})
	if list, err := e.Parked(t.Context(), ""); err != nil || len(list) != 5 {
		t.Errorf("%d events are parked: %v", len(list), err)
	}
	if err := e.DiscardParked(t.Context(), "shelf", at.String()); err != nil {
		t.Fatal(err)
	}
	// By then the task may have noticed the discard, and parked one more.
	if done, err := e.RetryParked(t.Context(), "shelf", ""); err != nil || done.Applied < 4 || done.Waiting > 0 {
		t.Errorf("retried: %+v, %v", done, err)
	}
	s.caughtUp(t, pool)
	if got := shelves(t, e); got != "MUG 9 more" {
		t.Errorf("the shelves are %q", got)
	}
}

func TestARetryOfManyIsManyTransactions(t *testing.T) {
	var broken atomic.Bool
	broken.Store(true)
	s := newShop()
	s.tell("MUG", inventory.Adjusted{Delta: 13, Reason: "first"})
	for range 2*repairs + 7 {
		s.tell("MUG", inventory.Adjusted{Delta: 1, Reason: "more"})
	}
	pool := openTest(t)
	e := newEngine(t, pool, s, func(c *Config) { c.Models = []projections.Model{shelf(1, &broken)} })
	start(t, e)
	s.caughtUp(t, pool)
	broken.Store(false)
	if done, err := e.RetryParked(t.Context(), "shelf", ""); err != nil || done != (Repaired{Applied: 2*repairs + 8, Waiting: 0}) {
		t.Errorf("retried: %+v, %v", done, err)
	}
	if got, want := shelves(t, e), fmt.Sprintf("MUG %d more", 13+2*repairs+7); got != want {
		t.Errorf("the shelves are %q, want %q", got, want)
	}
	verify(t, e, 0)
}

// What is gone over one by one is whole batches: of the topics of a batch some may be beyond what is gone over again.
func TestAnEventAtFaultTakesNoOtherTopicsEventsWithIt(t *testing.T) {
	both := projections.Define(projections.Spec[shelfKey, shelfRow]{
		Name: "shelf", Version: 1,
		Events: map[string]domain.Events{projections.InventoryTopic: inventory.Events, projections.OrdersTopic: orders.Events},
		Keys:   func(e projections.Event) []shelfKey { return []shelfKey{{e.Stream}} },
		Apply: func(_ shelfKey, r shelfRow, e projections.Event) shelfRow {
			if f, ok := e.Fact.(inventory.Received); ok {
				return shelfRow{r.Units + f.Quantity, ""}
			}
			return shelfRow{r.Units + 1, ""}
		},
	})
	for _, bulk := range []bool{false, true} {
		s := newShop()
		other := ""
		p := journal.Partition([]byte("MUG"), partitions)
		for i := 0; other == ""; i++ {
			if id := orderID(i); journal.Partition([]byte(id), partitions) == p {
				other = id
			}
		}
		for range 30 {
			s.tell(other, orders.Placed{Customer: "C", Total: pounds(1)})
		}
		s.tell("MUG", inventory.Received{Quantity: 5})
		s.tell("MUG", inventory.Received{Quantity: 1 << 40})
		for range 10 {
			s.tell("MUG", inventory.Received{Quantity: 1})
		}
		pool := openTest(t)
		e := newEngine(t, pool, s, func(c *Config) {
			c.Models = []projections.Model{both}
			c.Source = func(topic string) journal.Reader {
				return hesitant{s.reader(topic), &sync.Mutex{}, rand.New(rand.NewPCG(1, uint64(len(topic))))}
			}
		})
		start(t, e)
		s.caughtUp(t, pool)
		if bulk {
			if err := e.Replay(t.Context(), []string{"shelf"}, ReplayOptions{}, func(Progress) {}); err != nil {
				t.Error(err)
			}
		}
		want := fmt.Sprintf("%s 30 , MUG 5  stale", other)
		if got := shelves(t, e); got != want && got != fmt.Sprintf("MUG 5  stale, %s 30 ", other) {
			t.Errorf("bulk %v: the shelves are %q, want %q", bulk, got, want)
		}
		if n := one[int64](t, pool, "SELECT count(*) FROM wharf.parked k JOIN wharf.builds b ON b.id = k.build WHERE b.state = 'live'"); n != 11 {
			t.Errorf("bulk %v: %d events are parked, want 11", bulk, n)
		}
	}
}

// A program that cannot apply what the live one has applied is no program to replay with.
func TestAReplayThatParksMoreIsRefused(t *testing.T) {
	var broken atomic.Bool
	s := newShop()
	s.tell("MUG", inventory.Received{Quantity: 5}, inventory.Adjusted{Delta: 13, Reason: "x"}, inventory.Received{Quantity: 5})
	pool := openTest(t)
	e := newEngine(t, pool, s, func(c *Config) { c.Models = []projections.Model{shelf(1, &broken)} })
	start(t, e)
	s.caughtUp(t, pool)
	broken.Store(true)
	var difference *DifferenceError
	if err := e.Replay(t.Context(), []string{"shelf"}, ReplayOptions{}, func(Progress) {}); !errors.As(err, &difference) {
		t.Errorf("the replay says %v", err)
	}
	if got := shelves(t, e); got != "MUG 23 x" {
		t.Errorf("the shelves are %q", got)
	}
	err := e.Verify(t.Context(), []string{"shelf"}, func(Progress) {}, func(c Comparison) {
		if c.Same() || c.Unapplied != 2 {
			t.Errorf("the verification says %s", c.String())
		}
	})
	if err != nil {
		t.Error(err)
	}
}

// A replay, which reads the topics in another interleaving than the live build did, parks the same events and no others:
// those behind an event that cannot be applied in its own topic. So it is not refused, and no row is lost by it.
func TestParkingDoesNotDependOnHowTopicsAreRead(t *testing.T) {
	s := newShop()
	pool := openTest(t)
	e := newEngine(t, pool, s)
	start(t, e)
	s.stock(100)
	for i := range 30 {
		s.order(i, 3)
	}
	s.caughtUp(t, pool)
	for i := range 30 { // after all else has been applied
		s.raw(projections.PaymentsTopic, orderID(i), "payment.refunded.v1", `{"amount": "x"}`)
	}
	s.caughtUp(t, pool)
	before := dump(t, pool, e.Models)
	verify(t, e, 0)
	if err := e.Replay(t.Context(), allNames(e), ReplayOptions{}, func(Progress) {}); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff(before, dump(t, pool, e.Models)); diff != "" {
		t.Errorf("after a replay rows differ (-want +got):\n%s", diff)
	}
	if n := one[int](t, pool, "SELECT count(*) FROM wharf_read.orders WHERE stale AND version > 0"); n != 30 {
		t.Errorf("%d orders are shown and stale, want 30", n)
	}
	// What comes after it waits in its own topic alone.
	parked := "SELECT count(*) FROM wharf.parked k JOIN wharf.builds b ON b.id = k.build WHERE b.state = 'live' AND b.model = 'orders'"
	s.raw(projections.PaymentsTopic, orderID(1), "payment.refunded.v1", `{"amount": "y"}`)
	s.tell(orderID(1), orders.Cancelled{Reason: "late"})
	s.caughtUp(t, pool)
	if n := one[int](t, pool, parked); n != 31 {
		t.Errorf("%d events are parked, want 31", n)
	}
	if status := one[string](t, pool, "SELECT status FROM wharf_read.orders WHERE id = '"+orderID(1)+"'"); status != "cancelled" {
		t.Errorf("the order is %s", status)
	}
}

// What is given up stays so: a build in the making would not know of it, so nothing is given up beside one; and a retry
// applies nothing that was given up by a program of another version.
func TestWhatWasGivenUpStaysSo(t *testing.T) {
	e, broken, at := brokenShelf(t)
	err := e.Replay(t.Context(), []string{"shelf"}, ReplayOptions{}, func(p Progress) {
		if p.Phase == PhaseIndexing {
			if err := e.DiscardParked(t.Context(), "shelf", at.String()); !errors.Is(err, ErrReplaying) {
				t.Errorf("discarded beside a replay: %v", err)
			}
			// Or the swap would undo it.
			if _, err := e.RetryParked(t.Context(), "shelf", ""); !errors.Is(err, ErrReplaying) {
				t.Errorf("retried beside a replay: %v", err)
			}
		}
	})
	if err != nil {
		t.Error(err)
	}
	if _, err := e.pool.Exec(t.Context(), "INSERT INTO wharf.discarded (model, partition, topic, seq) VALUES ('shelf', $1, $2, $3)",
		at.Partition, at.Topic, at.Seq); err != nil {
		t.Fatal(err)
	}
	broken.Store(false)
	if done, err := e.RetryParked(t.Context(), "shelf", ""); err != nil || done != (Repaired{Applied: 0, Waiting: 0}) {
		t.Errorf("retried: %+v, %v", done, err)
	}
	if got := shelves(t, e); got != "MUG 5 " {
		t.Errorf("the shelves are %q", got)
	}
}

// The history of an order is stale while an event of a SKU waits that tells of the order.
func TestAHistoryThatMissesAnEventIsStale(t *testing.T) {
	s := newShop()
	id := orderID(1)
	s.tell(id, orders.Placed{Customer: "C", Total: pounds(5)})
	s.tell(orderID(2), orders.Placed{Customer: "C", Total: pounds(5)})
	s.raw(projections.InventoryTopic, "CUP", "stock.reserved.v1", `{"quantity": broken`)
	s.tell("CUP", inventory.Reserved{Order: uuid.MustParse(id), Quantity: 1})
	pool := openTest(t)
	e := newEngine(t, pool, s, func(c *Config) { c.Models = []projections.Model{projections.History} })
	start(t, e)
	s.caughtUp(t, pool)
	if got := one[string](t, pool, "SELECT string_agg(order_id::text, ',') FROM wharf_read.history WHERE stale"); got != id {
		t.Errorf("stale is the history of %s, want %s", got, id)
	}
}

// An order whose parts lie in several topics waits as one.
func TestAStreamWaitsInAllTopics(t *testing.T) {
	s := newShop()
	id := orderID(1)
	s.raw(projections.OrdersTopic, id, "order.placed.v1", `{"customer": broken`)
	s.tell(orderID(2), orders.Placed{Customer: "C", Total: pounds(5)})
	s.tell(id, orders.Cancelled{Reason: "changed my mind"})
	pool := openTest(t)
	e := newEngine(t, pool, s)
	start(t, e)
	s.caughtUp(t, pool)
	if got := one[string](t, pool, "SELECT string_agg(id::text, ' ') FROM wharf_read.orders"); got != orderID(2) {
		t.Errorf("the orders are %s", got)
	}
	p := journal.Partition([]byte(id), partitions)
	if n := one[int64](t, pool, "SELECT parked FROM wharf_read.builds WHERE model = 'orders' AND partition = $1", p); n != 2 {
		t.Errorf("%d events are parked", n)
	}
	if _, err := e.RetryParked(context.Background(), "order", ""); err == nil || !strings.Contains(err.Error(), "orders?") {
		t.Errorf("another read model is retried: %v", err)
	}
}

// What the live build has applied cannot be given up, although the previous one still waits for it.
func TestWhatTheLiveBuildHasIsNotGivenUp(t *testing.T) {
	e, broken, at := brokenShelf(t)
	broken.Store(false) // mended, and built anew
	if err := e.Replay(t.Context(), []string{"shelf"}, ReplayOptions{}, func(Progress) {}); err != nil {
		t.Fatal(err)
	}
	if err := e.DiscardParked(t.Context(), "shelf", at.String()); !errors.Is(err, errNotLive) {
		t.Error(err)
	}
	verify(t, e, 0)
	broken.Store(true)
	if done, err := e.RetryParked(t.Context(), "shelf", ""); err != nil || done != (Repaired{Previous: 1}) {
		t.Errorf("retried in vain: %+v, %v", done, err)
	}
	broken.Store(false)
	if done, err := e.RetryParked(t.Context(), "shelf", ""); err != nil || done != (Repaired{}) {
		t.Errorf("retried: %+v, %v", done, err)
	}
}

// A part for people to look at says how many events are missing from it.
func TestAPartSaysWhatIsMissing(t *testing.T) {
	broken := new(atomic.Bool)
	broken.Store(true)
	s := newShop()
	s.raw(projections.InventoryTopic, "JUG", "stock.received.v1", `{"quantity": "no number"}`)
	s.tell("MUG", inventory.Received{Quantity: 5}, inventory.Adjusted{Delta: 13}, inventory.Received{Quantity: 1})
	s.tell("CUP", inventory.Received{Quantity: 5})
	pool := openTest(t)
	e := newEngine(t, pool, s, func(c *Config) { c.Models = []projections.Model{shelf(1, broken)} })
	start(t, e)
	s.caughtUp(t, pool)
	var last Progress
	if err := e.Inspect(t.Context(), "shelf", Part{Key: "MUG"}, func(p Progress) { last = p }); err != nil {
		t.Fatal(err)
	}
	if last.Rows != 1 || last.Parked != 2 {
		t.Errorf("%d rows, and %d events are missing", last.Rows, last.Parked)
	}
	if err := e.Inspect(t.Context(), "shelf", Part{Key: "CUP"}, func(p Progress) { last = p }); err != nil || last.Parked != 0 {
		t.Errorf("%v; %d events of others are missing", err, last.Parked)
	}
	if err := e.Inspect(t.Context(), "shelf", Part{Key: "POT"}, func(Progress) {}); !errors.Is(err, ErrNoRow) {
		t.Error(err)
	}
}

// However many rows of a batch the table refuses, one after the other, the batch is not given up for the time that takes.
func TestAReplayThatParksManyComesToItsEnd(t *testing.T) {
	t.Parallel()
	s := newShop()
	for i, n := 0, 0; n < 200; i++ {
		if sku := fmt.Sprint("S", i); journal.Partition([]byte(sku), partitions) == 3 {
			s.tell(sku, inventory.Received{Quantity: 1 << 40})
			n++
		}
	}
	pool, e := s.projected(t, func(c *Config) {
		c.Models, c.Lost = []projections.Model{shelf(1, new(atomic.Bool))}, 100*time.Millisecond
	})
	if err := e.Replay(t.Context(), []string{"shelf"}, ReplayOptions{}, func(Progress) {}); err != nil {
		t.Error(err)
	}
	if n := one[int](t, pool, "SELECT count(*) FROM wharf.parked k JOIN wharf.builds b ON b.id = k.build WHERE b.state = 'live'"); n != 200 {
		t.Errorf("%d events are parked", n)
	}
}

// A build in which events are parked can come back; what it lacks is said.
func TestARollbackSaysWhatIsMissing(t *testing.T) {
	s := newShop()
	s.tell("MUG", inventory.Received{Quantity: 1})
	pool, e := s.projected(t, func(c *Config) { c.Models = []projections.Model{projections.Stock} })
	if _, err := pool.Exec(t.Context(), "ALTER TABLE wharf_build_1.stock ADD CHECK (received < 2)"); err != nil {
		t.Fatal(err)
	}
	s.tell("MUG", inventory.Received{Quantity: 1}, inventory.Received{Quantity: 1})
	s.project(t, e)
	if err := e.Replay(t.Context(), []string{"stock"}, ReplayOptions{}, func(Progress) {}); err != nil {
		t.Fatal(err)
	}
	status, err := projections.ReadStatus(t.Context(), pool, testLags{s})
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range status.Items {
		if b.Name == "stock" && (b.Parked != 0 || b.Previous.Parked != 2) {
			t.Errorf("%d events are parked, and %d in the previous build", b.Parked, b.Previous.Parked)
		}
	}
	var last Progress
	if err := e.Rollback(t.Context(), "stock", func(p Progress) { last = p }); err != nil {
		t.Fatal(err)
	}
	if last.Phase != PhaseDone || last.Parked != 2 {
		t.Errorf("in the end it says %q, and that %d events are missing", last.Phase, last.Parked)
	}
}

// A stream's id may be longer than what is kept of a parked event's key: its row waits all the same.
func TestALongStreamWaits(t *testing.T) {
	broken := new(atomic.Bool)
	broken.Store(true)
	s := newShop()
	for _, long := range []string{incompressible(1600), strings.Repeat("MUG", 1000)} {
		s.tell(long, inventory.Received{Quantity: 5}, inventory.Adjusted{Delta: 13, Reason: "x"})
	}
	pool, e := s.projected(t, func(c *Config) { c.Models = []projections.Model{shelf(1, broken)} })
	if n := one[int](t, pool, "SELECT count(*) FROM wharf_read.shelf WHERE stale"); n != 2 {
		t.Errorf("%d of 2 rows are stale", n)
	}
	broken.Store(false)
	if c, err := e.verify(t.Context(), e.Models[0], 0, func(Progress) {}); err != nil || c.Differences() != 0 || c.Parked != 2 {
		t.Errorf("%+v, %v", c, err)
	}
}

// incompressible is a text that is no shorter when it is compressed.
func incompressible(length int) string {
	random := make([]byte, length)
	_, _ = rand.NewChaCha8([32]byte{}).Read(random)
	return base64.StdEncoding.EncodeToString(random)[:length]
}

// A repair whose lock was lost, and whose build was swapped out, says so.
func TestARepairWithoutItsLockDoesNothing(t *testing.T) {
	e, _, _ := brokenShelf(t)
	repaired := errors.New("it went on")
	err := e.eachParked(t.Context(), "shelf", func(m projections.Model, b build, p int32) error {
		if _, err := e.pool.Exec(t.Context(), `SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND classid = $1
			AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`, int64(lockClass)); err != nil {
			return err
		}
		eventually(t, "the lock is free", func() bool {
			return e.Replay(t.Context(), []string{"shelf"}, ReplayOptions{}, func(Progress) {}) == nil
		})
		_, _, err := e.repair(t.Context(), m, b, p, "")
		return errors.Join(repaired, err)
	})
	if !errors.Is(err, repaired) || !errors.Is(err, errSwapped) {
		t.Error(err)
	}
}

// Who gives up an event of one partition makes no task of another begin anew.
func TestADiscardTouchesItsPartitionOnly(t *testing.T) {
	s := newShop()
	for i := range 20 {
		s.raw(projections.InventoryTopic, fmt.Sprint("SKU", i), "stock.received.v1", `{"quantity": broken`)
	}
	pool, e := s.projected(t, func(c *Config) { c.Models = []projections.Model{projections.Stock} })
	touched := "SELECT array_agg(partition) FROM wharf.tasks WHERE epoch > 0"
	if before := one[[]int32](t, pool, touched); before != nil {
		t.Fatal(before)
	}
	parked, err := e.Parked(t.Context(), "stock")
	if err == nil {
		err = e.DiscardParked(t.Context(), "stock", parked[0].Position)
	}
	if err != nil {
		t.Fatal(err)
	}
	at, _ := journal.ParsePosition(parked[0].Position)
	if diff := cmp.Diff([]int32{at.Partition}, one[[]int32](t, pool, touched)); diff != "" {
		t.Error("these begin anew (-want +got):", diff)
	}
}
