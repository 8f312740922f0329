package inventory_test

import (
	"testing"

	"github.com/google/uuid"
	"pgregory.net/rapid"

	"wharf/domain"
	"wharf/domain/domaintest"
	"wharf/domain/inventory"
)

type decision = func(inventory.Stock) ([]domain.Event, error)

func receive(n int64) decision {
	return func(s inventory.Stock) ([]domain.Event, error) { return s.DecideReceive(n) }
}
func adjust(n int64) decision {
	return func(s inventory.Stock) ([]domain.Event, error) { return s.DecideAdjust(n, "count") }
}
func reserve(order uuid.UUID, n int64) decision {
	return func(s inventory.Stock) ([]domain.Event, error) { return s.DecideReserve(order, n) }
}
func release(order uuid.UUID) decision {
	return func(s inventory.Stock) ([]domain.Event, error) { return s.DecideRelease(order) }
}
func ship(order uuid.UUID) decision {
	return func(s inventory.Stock) ([]domain.Event, error) { return s.DecideShip(order) }
}

func given(t *testing.T, events ...domain.Event) *domaintest.Scenario[inventory.Stock] {
	t.Helper()
	return domaintest.Given[inventory.Stock](t, events...)
}

var a, b = uuid.New(), uuid.New()

func TestReservations(t *testing.T) {
	given(t, inventory.Received{Quantity: 10}).
		When(reserve(a, 6)).Then(inventory.Reserved{Order: a, Quantity: 6}).
		When(reserve(a, 6)).ThenNothing().
		When(reserve(b, 5)).Then(inventory.ReservationRejected{Order: b, Quantity: 5, Available: 4}).
		When(release(a)).Then(inventory.Released{Order: a, Quantity: 6}).
		When(release(a)).ThenNothing().
		When(ship(a)).ThenNothing().
		When(reserve(b, 10)).Then(inventory.Reserved{Order: b, Quantity: 10}).
		When(ship(b)).Then(inventory.Shipped{Order: b, Quantity: 10}).
		When(ship(b)).ThenNothing().
		When(release(b)).ThenNothing()
}

func TestAnUnknownSKUHasNothing(t *testing.T) {
	given(t).When(reserve(a, 1)).Then(inventory.ReservationRejected{Order: a, Quantity: 1})
	given(t).When(adjust(1)).ThenRefused("unknown")
}

func TestAdjustmentsTakeNothingThatIsPromised(t *testing.T) {
	given(t, inventory.Received{Quantity: 10}).
		When(reserve(a, 8)).
		When(adjust(-3)).ThenRefused("not-enough-stock").
		When(adjust(-2)).Then(inventory.Adjusted{Delta: -2, Reason: "count"}).
		When(adjust(5)).Then(inventory.Adjusted{Delta: 5, Reason: "count"})
	given(t, inventory.Received{Quantity: inventory.Limit}).When(receive(1)).ThenRefused("too-much-stock")
}

// After any commands: nothing is negative, and received + adjusted = available + reserved + shipped.
func TestStockBalances(t *testing.T) {
	orders := make([]uuid.UUID, 40)
	for i := range orders {
		orders[i] = uuid.New()
	}
	rapid.Check(t, func(t *rapid.T) {
		s := domaintest.Given[inventory.Stock](t)
		var in, out int64
		reserved := map[uuid.UUID]int64{}
		for range rapid.IntRange(1, 120).Draw(t, "steps") {
			order := rapid.SampledFrom(orders).Draw(t, "order")
			n := rapid.Int64Range(1, 9).Draw(t, "units")
			decide := rapid.SampledFrom([]decision{receive(n), adjust(n), adjust(-n), reserve(order, n), release(order), ship(order)}).Draw(t, "command")
			events, _ := decide(s.State)
			s.When(decide)
			for _, e := range events {
				switch e := e.(type) {
				case inventory.Received:
					in += e.Quantity
				case inventory.Adjusted:
					in += e.Delta
				case inventory.Reserved:
					reserved[e.Order] = e.Quantity
				case inventory.Released:
					delete(reserved, e.Order)
				case inventory.Shipped:
					out += reserved[e.Order]
					delete(reserved, e.Order)
				}
			}
			held := int64(0)
			for order, units := range reserved {
				held += units
				if s.State.Reserved(order) != units {
					t.Fatalf("order holds %d, want %d", s.State.Reserved(order), units)
				}
			}
			if s.State.Available < 0 || in != s.State.Available+held+out {
				t.Fatalf("in %d, available %d, reserved %d, out %d", in, s.State.Available, held, out)
			}
		}
	})
}
