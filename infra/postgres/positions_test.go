package postgres

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"wharf/domain"
	"wharf/domain/inventory"
	"wharf/domain/orders"
	"wharf/infra/journal"
	"wharf/projections"
)

// A query with a command's token has what the command did, and one whose token is out of reach says where the read model
// stands. A read model that does not listen to the token's topic need not wait.
func TestAQueryWithATokenReadsItsCallersWrites(t *testing.T) {
	s := newShop()
	a := newAPI(t, s)
	ask := func(path, token, prefer string) *httptest.ResponseRecorder {
		r := httptest.NewRequest(http.MethodGet, path, nil)
		r.Header.Set("Consistency-Token", token)
		if prefer != "" {
			r.Header.Set("Prefer", prefer)
		}
		w := httptest.NewRecorder()
		a.handler.ServeHTTP(w, r)
		return w
	}
	for i := range 50 {
		at := s.tell(orderID(i), orders.Placed{Customer: "C", Total: pounds(5)})
		if w := ask("/orders/"+orderID(i), at.String(), ""); w.Code != http.StatusOK {
			t.Fatalf("order %d: %d %s", i, w.Code, w.Body)
		}
	}
	at := s.tell("MUG", inventory.Received{Quantity: 1})
	if w := ask("/stock/MUG", at.String(), "respond-async, wait=5"); w.Code != http.StatusOK {
		t.Errorf("the stock: %d %s", w.Code, w.Body)
	}
	beyond := at
	beyond.Seq += 1000
	if w := ask("/stock/MUG", beyond.String(), "wait=0"); w.Code == http.StatusOK {
		t.Errorf("a token of what has not happened: %d %s", w.Code, w.Body)
	}
	if w := ask("/orders", beyond.String(), "wait=0"); w.Code != http.StatusOK {
		t.Errorf("orders need not wait for stock: %d %s", w.Code, w.Body)
	}
	for _, bad := range []string{"x", "orders.events/1", "orders.events/-1/3", "orders.events/1/99999999999999999999", "orders.journal/1/3"} {
		if w := ask("/orders", bad, ""); w.Code != http.StatusUnprocessableEntity {
			t.Errorf("token %q: %d %s", bad, w.Code, w.Body)
		}
	}
}

// counted counts what is asked of the database.
type counted struct {
	querier
	n atomic.Int64
}

func (c *counted) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	c.n.Add(1)
	return c.querier.Query(ctx, sql, args...)
}

// However many wait, one asks; who waits for nothing that comes is told where the read model stands.
func TestManyWaitForOneQuestion(t *testing.T) {
	s := newShop()
	pool := openTest(t)
	e := newEngine(t, pool, s)
	start(t, e)
	at := s.tell("MUG", inventory.Received{Quantity: 1})
	asked := &counted{querier: pool}
	p := NewPositions(asked)
	const waiters = 2000
	var wg sync.WaitGroup
	var behind atomic.Int64
	next := domain.Position{Topic: at.Topic, Partition: at.Partition, Seq: at.Seq + 1}
	never := domain.Position{Topic: at.Topic, Partition: 1000, Seq: 1}
	ctx, cancel := context.WithCancel(t.Context())
	for i := range waiters {
		wg.Go(func() {
			var err error
			switch i % 3 {
			case 0:
				err = p.Wait(t.Context(), "stock", at, time.Minute)
			case 1:
				err = p.Wait(t.Context(), "stock", next, time.Minute)
			default:
				err = p.Wait(ctx, "stock", never, time.Minute)
				var b *projections.BehindError
				if errors.As(err, &b) && strings.Contains(err.Error(), "has seen 0 events") {
					behind.Add(1)
					err = nil
				}
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	if err := p.Wait(t.Context(), "stock", at, time.Minute); err != nil {
		t.Error(err)
	}
	s.tell("MUG", inventory.Received{Quantity: 1})
	if err := p.Wait(t.Context(), "stock", next, time.Minute); err != nil {
		t.Error(err)
	}
	cancel()
	wg.Wait()
	if n := behind.Load(); n != waiters/3 {
		t.Errorf("%d were told that the read model is behind, want %d", n, waiters/3)
	}
	if n := asked.n.Load(); n > waiters/2 {
		t.Errorf("%d questions for %d waiters", n, waiters)
	}
	eventually(t, "nobody asks while nobody waits", func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return !p.asking
	})
}

// What a row was at a time or a position is what the events until then say.
func TestARowAsItWas(t *testing.T) {
	s := newShop()
	id := orderID(1)
	placed := s.tell(id, orders.Placed{Customer: "C", Total: pounds(5)})
	cancelled := s.tell(id, orders.Cancelled{Reason: "changed my mind"})
	s.tell(orderID(2), orders.Placed{Customer: "D", Total: pounds(7)})
	e := New(nil, Config{Source: s.reader, Partitions: partitions})
	status := func(key string, at *Moment) string {
		snapshot, err := e.AsOf(t.Context(), "orders", key, at, nil)
		if err != nil {
			return err.Error()
		}
		return fmt.Sprint(snapshot.Rows[0]["status"], snapshot.Events, len(snapshot.Rows))
	}
	moment := func(text string) *Moment {
		m, err := ParseMoment(text)
		if err != nil {
			t.Fatal(err)
		}
		return &m
	}
	if got := status(id, nil); got != "cancelled2 1" {
		t.Errorf("now it is %s", got)
	}
	if got := status(id, moment(placed.String())); !strings.HasPrefix(got, "placed") {
		t.Errorf("when it was placed it was %s", got)
	}
	if got := status(id, moment(cancelled.String())); !strings.HasPrefix(got, "cancelled") {
		t.Errorf("when it was cancelled it was %s", got)
	}
	for key, want := range map[string]string{
		id:         "no such row", // long ago
		orderID(9): "no such row",
		"x":        "reads id (uuid)",
	} {
		if got := status(key, moment("2000-01-01T00:00:00Z")); !strings.Contains(got, want) {
			t.Errorf("%s: %s, want %s", key, got, want)
		}
	}
	beyond := cancelled
	beyond.Seq += 100
	if got := status(id, moment(beyond.String())); !strings.Contains(got, "there is no event at") {
		t.Errorf("beyond the end: %s", got)
	}
	if _, err := ParseMoment("yesterday"); err == nil {
		t.Error("yesterday is a moment")
	}
	history, err := e.AsOf(t.Context(), "history", id, moment(placed.String()), nil)
	if err != nil || len(history.Rows) != 1 || history.Rows[0]["type"] != "order.placed.v1" {
		t.Errorf("its history then: %+v, %v", history, err)
	}
}

// A part of what happened can be looked at in a table of its own, which leaves the live one alone.
func TestAPartIsBuiltForInspection(t *testing.T) {
	s := newShop()
	id := orderID(1)
	placed := s.tell(id, orders.Placed{Customer: "C", Total: pounds(5)})
	s.tell(id, orders.Cancelled{Reason: "changed my mind"})
	s.tell(orderID(2), orders.Placed{Customer: "D", Total: pounds(7)})
	pool := openTest(t)
	e := newEngine(t, pool, s)
	start(t, e)
	s.caughtUp(t, pool)
	until, err := ParseMoment(placed.String())
	if err != nil {
		t.Fatal(err)
	}
	var last Progress
	tell := func(p Progress) { last = p }
	if err := e.Inspect(t.Context(), "orders", Part{Until: &until, Key: id}, tell); err != nil {
		t.Fatal(err)
	}
	if got := one[string](t, pool, "SELECT string_agg(customer || ' ' || status, ', ') FROM "+last.Table); got != "C placed" {
		t.Errorf("the part is %s", got)
	}
	if err := e.Inspect(t.Context(), "orders", Part{From: &until, Key: id}, tell); err != nil {
		t.Fatal(err)
	}
	if got := one[string](t, pool, "SELECT string_agg(customer || ' ' || status, ', ') FROM "+last.Table); got != "C cancelled" {
		t.Errorf("the part is %s", got)
	}
	early := Moment{Time: time.Unix(1, 0)}
	if err := e.Inspect(t.Context(), "orders", Part{From: &until, Until: &early}, tell); err == nil || !strings.Contains(err.Error(), "there is nothing between") {
		t.Errorf("up to a time before the position: %v", err)
	}
	if err := e.Inspect(t.Context(), "orders", Part{Key: orderID(9)}, tell); !errors.Is(err, ErrNoRow) {
		t.Errorf("no such row: %v", err)
	}
	if n := one[int64](t, pool, "SELECT count(*) FROM wharf_read.orders"); n != 2 {
		t.Errorf("there are %d live orders", n)
	}
}

// However short the wait, an answer is about the present: what is there is found, and what is there no more is not.
func TestAWaitLooksAtLeastOnce(t *testing.T) {
	s := newShop()
	at := s.tell("MUG", inventory.Received{Quantity: 1})
	pool := openTest(t)
	e := newEngine(t, pool, s)
	stop := start(t, e)
	s.caughtUp(t, pool)
	for range 20 {
		if err := NewPositions(pool).Wait(t.Context(), "stock", at, 0); err != nil {
			t.Fatal(err)
		}
	}
	p := NewPositions(pool)
	if err := p.Wait(t.Context(), "stock", at, 0); err != nil {
		t.Fatal(err)
	}
	stop()
	// A database that crashed may have lost its last moment.
	if _, err := pool.Exec(t.Context(), "UPDATE wharf.tasks SET seqs = array_fill(0, ARRAY[cardinality(seqs)])"); err != nil {
		t.Fatal(err)
	}
	p.asked = p.asked.Add(-fresh)
	if err := p.Wait(t.Context(), "stock", at, 0); err == nil {
		t.Error("a position that was lost is taken for seen")
	}
}

// Who waits for what does not come is asked for less and less often.
func TestWhoWaitsForLongIsAskedForLessOften(t *testing.T) {
	s := newShop()
	pool := openTest(t)
	newEngine(t, pool, s)
	asked := &counted{querier: pool}
	never := domain.Position{Topic: projections.InventoryTopic, Partition: 1, Seq: 1}
	var behind *projections.BehindError
	if err := NewPositions(asked).Wait(t.Context(), "stock", never, time.Second); !errors.As(err, &behind) {
		t.Error(err)
	}
	if n := asked.n.Load(); n > 300 { // about 42 until pauses are of 5 ms, and 192 such
		t.Errorf("%d questions within a second", n)
	}
}

// Who waits while the database is away is told so, and not that the read model is behind.
func TestAWaitTellsThatTheDatabaseIsAway(t *testing.T) {
	pool := openTest(t)
	pool.Close()
	err := NewPositions(pool).Wait(t.Context(), "stock", domain.Position{Topic: projections.InventoryTopic, Seq: 1}, 0)
	if err == nil || !strings.Contains(err.Error(), "closed pool") {
		t.Errorf("it says %v", err)
	}
}

// Rows of one time come in the order of their partition.
func TestRowsOfOneTimeComeInOrder(t *testing.T) {
	s := newShop()
	data, err := domain.Encode(orders.ItemReserved{})
	if err != nil {
		t.Fatal(err)
	}
	for range 12 {
		r := s.Next(projections.OrdersTopic, orderID(1), orders.ItemReserved{}.EventName(), data)
		r.Time = time.Date(2026, 3, 31, 0, 0, 0, 0, time.UTC)
		s.append(projections.OrdersTopic, journal.NewEventRecord(r))
	}
	got, err := New(nil, Config{Source: s.reader, Partitions: partitions}).AsOf(t.Context(), "history", orderID(1), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i, row := range got.Rows {
		if row["seq"] != int64(i+1) {
			t.Errorf("row %d is of event %v", i, row["seq"])
		}
	}
}
