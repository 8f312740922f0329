package orders_test

import (
	"testing"
	"time"

	"pgregory.net/rapid"

	"wharf/domain"
	"wharf/domain/domaintest"
	"wharf/domain/orders"
)

var (
	deadline = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	lines    = []orders.Line{line("MUG", 6, 255), line("LAMP", 1, 1500), line("MUG", 2, 199)}
	items    = []domain.Quantity{{SKU: "LAMP", Quantity: 1}, {SKU: "MUG", Quantity: 8}}
	total    = domain.Money{Amount: 6*255 + 1500 + 2*199, Currency: "GBP"}

	placed         = orders.Placed{Customer: "17850", Lines: lines, Items: items, Total: total, Deadline: deadline}
	stockConfirmed = orders.StockConfirmed{Total: total}
	confirmed      = orders.Confirmed{Items: items}
	shipped        = orders.Shipped{Carrier: "dhl", Tracking: "t1", Items: items, Total: total}
)

func line(sku string, quantity, price int64) orders.Line {
	return orders.Line{SKU: sku, Quantity: quantity, UnitPrice: domain.Money{Amount: price, Currency: "GBP"}}
}

type decision = func(orders.Order) ([]domain.Event, error)

func place(o orders.Order) ([]domain.Event, error) { return o.DecidePlace("17850", lines, deadline) }
func reserved(sku string) decision {
	return func(o orders.Order) ([]domain.Event, error) { return o.DecideItemReserved(sku) }
}
func reject(o orders.Order) ([]domain.Event, error) { return o.DecideReject("no stock") }
func cancel(reason string) decision {
	return func(o orders.Order) ([]domain.Event, error) { return o.DecideCancel(reason) }
}
func expire(at time.Time) decision {
	return func(o orders.Order) ([]domain.Event, error) { return o.DecideExpire(at) }
}
func dispatched(o orders.Order) ([]domain.Event, error) { return o.DecideShipped("dhl", "t1") }

func given(t *testing.T, events ...domain.Event) *domaintest.Scenario[orders.Order] {
	t.Helper()
	return domaintest.Given[orders.Order](t, events...)
}

func TestTheWayOfAnOrder(t *testing.T) {
	given(t).
		When(place).Then(placed).
		When(reserved("MUG")).Then(orders.ItemReserved{SKU: "MUG"}).
		When(reserved("LAMP")).Then(orders.ItemReserved{SKU: "LAMP"}, stockConfirmed).
		When(orders.Order.DecideConfirm).Then(confirmed).
		When(dispatched).Then(shipped).
		When(orders.Order.DecideDelivered).Then(orders.Delivered{Items: items})
}

func TestRepeatsChangeNothing(t *testing.T) {
	given(t, placed, orders.ItemReserved{SKU: "MUG"}).When(reserved("MUG")).ThenNothing()
	given(t, placed, stockConfirmed).When(reserved("LAMP")).ThenNothing()
	given(t, placed, stockConfirmed, confirmed).When(orders.Order.DecideConfirm).ThenNothing()
	given(t, placed, stockConfirmed, confirmed, shipped).When(dispatched).ThenNothing()
	given(t, placed).When(cancel("r")).When(cancel("r")).ThenNothing()
	given(t, placed).When(reject).When(reject).ThenNothing()
	given(t, placed).When(reserved("NOT-OURS")).ThenNothing()
}

func TestPlacingTwiceIsRefused(t *testing.T) {
	given(t, placed).When(place).ThenRefused("order-already-placed")
}

func TestCancellation(t *testing.T) {
	cancelled := orders.Cancelled{Reason: "changed my mind", Items: items}
	requested := orders.CancellationRequested{Reason: "changed my mind"}
	now := cancel("changed my mind")

	given(t).When(now).ThenRefused("unknown")
	given(t, placed).When(now).Then(cancelled)
	given(t, placed, stockConfirmed).When(now).Then(cancelled)
	// After confirmation the shipment decides.
	given(t, placed, stockConfirmed, confirmed).When(now).Then(requested).
		When(orders.Order.DecideCancelled).Then(cancelled)
	given(t, placed, stockConfirmed, confirmed, requested).When(dispatched).Then(shipped).
		When(orders.Order.DecideCancelled).ThenNothing()
	// Too late, or ended otherwise.
	given(t, placed, stockConfirmed, confirmed, shipped).When(now).ThenRefused("order-shipped")
	given(t, placed).When(reject).When(now).ThenRefused("order-rejected")
	given(t, placed, cancelled).When(cancel("other")).ThenRefused("order-cancelled-otherwise")
}

func TestDeadline(t *testing.T) {
	expired := orders.Expired{Reason: "not confirmed in time", Items: items}
	given(t, placed).When(expire(deadline.Add(-1))).ThenNothing()
	given(t, placed).When(expire(deadline)).Then(expired)
	given(t, placed, stockConfirmed).When(expire(deadline)).Then(expired).When(orders.Order.DecideConfirm).ThenNothing()
	given(t, placed, stockConfirmed, confirmed).When(expire(deadline.Add(time.Hour))).ThenNothing()
}

func TestLateMessagesOfAnEndedOrder(t *testing.T) {
	given(t, placed).When(cancel("r")).
		When(reserved("MUG")).ThenNothing().
		When(reject).ThenNothing().
		When(orders.Order.DecideConfirm).ThenNothing().
		When(expire(deadline)).ThenNothing()
}

func TestTotal(t *testing.T) {
	for name, bad := range map[string][]orders.Line{
		"overflow of a line": {line("A", 1_000_000, 1<<53)},
		"mixed currencies":   {line("A", 1, 1), {SKU: "B", Quantity: 1, UnitPrice: domain.Money{Amount: 1, Currency: "EUR"}}},
	} {
		if _, err := orders.Total(bad); err == nil {
			t.Error(name, "is accepted")
		}
	}
}

// Whatever is decided in whatever order: deciding it again yields nothing, at most one ending is recorded, and Evolve
// takes every fact in any state.
func TestAnyCourseOfEvents(t *testing.T) {
	decisions := []decision{reserved("MUG"), reserved("LAMP"), reject, orders.Order.DecideConfirm, cancel("r"),
		orders.Order.DecideCancelled, expire(deadline), dispatched, orders.Order.DecideDelivered}
	facts := []domain.Event{placed, orders.ItemReserved{SKU: "MUG"}, orders.ItemReserved{SKU: "?"}, stockConfirmed, confirmed,
		orders.CancellationRequested{}, shipped, orders.Delivered{}, orders.Rejected{}, orders.Cancelled{}, orders.Expired{}}
	rapid.Check(t, func(t *rapid.T) {
		s := domaintest.Given[orders.Order](t, placed)
		endings := 0
		for _, decide := range rapid.SliceOfN(rapid.SampledFrom(decisions), 1, 30).Draw(t, "decisions") {
			events, err := decide(s.State)
			if err != nil {
				continue
			}
			for _, e := range events {
				switch e.(type) {
				case orders.Rejected, orders.Cancelled, orders.Expired, orders.Delivered:
					endings++
				}
			}
			s.When(decide)
			if s.When(decide); err == nil {
				s.ThenNothing()
			}
		}
		if endings > 1 || s.State.Closed() != (endings == 1) {
			t.Fatalf("%d endings, status %s", endings, s.State.Status)
		}
		for _, f := range rapid.SliceOf(rapid.SampledFrom(facts)).Draw(t, "facts") {
			s.State = s.State.Evolve(f)
		}
	})
}
