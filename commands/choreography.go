package commands

import (
	"encoding/json"
	"fmt"

	"github.com/google/uuid"

	"wharf/domain"
	"wharf/domain/inventory"
	"wharf/domain/orders"
	"wharf/domain/payments"
	"wharf/domain/shipping"
)

// The whole choreography: on this event of another service, this decision on that stream of our own. Each service has
// one table; nothing else makes one service act on what another did.

// Orders listens to everybody: the order is the process manager.
var Orders = Policies[orders.Order]{
	on(func(e inventory.Reserved, r domain.Recorded) []Reaction[orders.Order] {
		return to(e.Order.String(), func(o orders.Order) ([]domain.Event, error) { return o.DecideItemReserved(r.Stream) })
	}),
	on(func(e inventory.ReservationRejected, r domain.Recorded) []Reaction[orders.Order] {
		reason := fmt.Sprintf("not enough stock of %s", r.Stream)
		return to(e.Order.String(), func(o orders.Order) ([]domain.Event, error) { return o.DecideReject(reason) })
	}),
	on(func(_ payments.Authorized, r domain.Recorded) []Reaction[orders.Order] {
		return to(r.Stream, orders.Order.DecideConfirm)
	}),
	on(func(e payments.Declined, r domain.Recorded) []Reaction[orders.Order] {
		reason := "payment declined: " + e.Reason
		return to(r.Stream, func(o orders.Order) ([]domain.Event, error) { return o.DecideReject(reason) })
	}),
	on(func(e shipping.Dispatched, r domain.Recorded) []Reaction[orders.Order] {
		return to(r.Stream, func(o orders.Order) ([]domain.Event, error) { return o.DecideShipped(e.Carrier, e.Tracking) })
	}),
	on(func(_ shipping.Delivered, r domain.Recorded) []Reaction[orders.Order] {
		return to(r.Stream, orders.Order.DecideDelivered)
	}),
	on(func(_ shipping.Cancelled, r domain.Recorded) []Reaction[orders.Order] {
		return to(r.Stream, orders.Order.DecideCancelled)
	}),
}

// Inventory sets stock aside for a placed order, gives it back when the order ends and takes it out when it leaves.
var Inventory = Policies[inventory.Stock]{
	on(func(e orders.Placed, r domain.Recorded) []Reaction[inventory.Stock] {
		return eachItem(r.Stream, e.Items, func(s inventory.Stock, order uuid.UUID, quantity int64) ([]domain.Event, error) {
			return s.DecideReserve(order, quantity)
		})
	}),
	on(func(e orders.Rejected, r domain.Recorded) []Reaction[inventory.Stock] {
		return release(r.Stream, e.Items)
	}),
	on(func(e orders.Cancelled, r domain.Recorded) []Reaction[inventory.Stock] {
		return release(r.Stream, e.Items)
	}),
	on(func(e orders.Expired, r domain.Recorded) []Reaction[inventory.Stock] {
		return release(r.Stream, e.Items)
	}),
	on(func(e shipping.Dispatched, r domain.Recorded) []Reaction[inventory.Stock] {
		return eachItem(r.Stream, e.Items, func(s inventory.Stock, order uuid.UUID, _ int64) ([]domain.Event, error) {
			return s.DecideShip(order)
		})
	}),
}

// Payments authorises when the stock is there, captures when the goods leave, and gives back what an ended order
// does not owe.
var Payments = Policies[payments.Payment]{
	on(func(e orders.StockConfirmed, r domain.Recorded) []Reaction[payments.Payment] {
		return to(r.Stream, func(p payments.Payment) ([]domain.Event, error) { return p.DecideAuthorize(e.Total) })
	}),
	on(func(_ shipping.Dispatched, r domain.Recorded) []Reaction[payments.Payment] {
		return to(r.Stream, payments.Payment.DecideCapture)
	}),
	on(func(_ orders.Rejected, r domain.Recorded) []Reaction[payments.Payment] { return endPayment(r) }),
	on(func(_ orders.Cancelled, r domain.Recorded) []Reaction[payments.Payment] { return endPayment(r) }),
	on(func(_ orders.Expired, r domain.Recorded) []Reaction[payments.Payment] { return endPayment(r) }),
}

// Shipping packs what is confirmed, and decides whether a cancellation comes in time.
var Shipping = Policies[shipping.Shipment]{
	on(func(e orders.Confirmed, r domain.Recorded) []Reaction[shipping.Shipment] {
		return to(r.Stream, func(s shipping.Shipment) ([]domain.Event, error) { return s.DecideCreate(e.Items) })
	}),
	on(func(_ orders.CancellationRequested, r domain.Recorded) []Reaction[shipping.Shipment] {
		return to(r.Stream, shipping.Shipment.DecideCancel)
	}),
}

func release(order string, items []domain.Quantity) []Reaction[inventory.Stock] {
	return eachItem(order, items, func(s inventory.Stock, order uuid.UUID, _ int64) ([]domain.Event, error) {
		return s.DecideRelease(order)
	})
}

func endPayment(r domain.Recorded) []Reaction[payments.Payment] {
	refund := uuid.NewSHA1(r.ID, []byte("refund"))
	return to(r.Stream, func(p payments.Payment) ([]domain.Event, error) { return p.DecideEnd(refund) })
}

// Policies is a service's table: what it does on which event of another service.
type Policies[S any] []Policy[S]

// Policy reacts to one kind of event.
type Policy[S any] struct {
	Event string // stored name
	react func(domain.Recorded) ([]Reaction[S], error)
}

// Reaction is a decision on one stream of the service. An event has at most one reaction per stream.
type Reaction[S any] struct {
	Stream string
	Decide Decision[S]
}

// React is what the service does on the event: nothing, when it has no policy for it. An event of a known name that
// cannot be read is an error.
func (ps Policies[S]) React(r domain.Recorded) ([]Reaction[S], error) {
	for _, p := range ps {
		if p.Event == r.Name {
			return p.react(r)
		}
	}
	return nil, nil
}

func on[E domain.Event, S any](react func(E, domain.Recorded) []Reaction[S]) Policy[S] {
	var zero E
	return Policy[S]{zero.EventName(), func(r domain.Recorded) ([]Reaction[S], error) {
		var e E
		if err := json.Unmarshal(r.Data, &e); err != nil {
			return nil, fmt.Errorf("decode %s: %w", r.Name, err)
		}
		return react(e, r), nil
	}}
}

func to[S any](stream string, decide Decision[S]) []Reaction[S] {
	return []Reaction[S]{{stream, decide}}
}

func eachItem(order string, items []domain.Quantity,
	decide func(inventory.Stock, uuid.UUID, int64) ([]domain.Event, error)) []Reaction[inventory.Stock] {
	id, err := uuid.Parse(order)
	if err != nil {
		return nil // no order of ours
	}
	reactions := make([]Reaction[inventory.Stock], len(items))
	for i, item := range items {
		reactions[i] = Reaction[inventory.Stock]{item.SKU, func(s inventory.Stock) ([]domain.Event, error) {
			return decide(s, id, item.Quantity)
		}}
	}
	return reactions
}
