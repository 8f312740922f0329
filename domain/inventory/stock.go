// Package inventory answers the question "what can happen to the stock of one SKU?". Read this file first: the
// events, then Stock with Evolve and one Decide method a wish. Stock is never negative and never promised twice.
package inventory

import (
	"github.com/google/uuid"

	"wharf/domain"
)

// The events of a stock item. Quantities are units, always above 0; only Adjusted is signed.
type (
	// Received adds units from a supplier.
	Received struct {
		Quantity int64 `json:"quantity"`
	}
	// Adjusted corrects the count after a look at the shelf.
	Adjusted struct {
		Delta  int64  `json:"delta"`
		Reason string `json:"reason"`
	}
	// Reserved sets units aside for an order.
	Reserved struct {
		Order    uuid.UUID `json:"order"`
		Quantity int64     `json:"quantity"`
	}
	// ReservationRejected says that there were too few for the order.
	ReservationRejected struct {
		Order     uuid.UUID `json:"order"`
		Quantity  int64     `json:"quantity"`
		Available int64     `json:"available"`
	}
	// Released puts an order's units back on the shelf.
	Released struct {
		Order    uuid.UUID `json:"order"`
		Quantity int64     `json:"quantity"`
	}
	// Shipped says that an order's units have left.
	Shipped struct {
		Order    uuid.UUID `json:"order"`
		Quantity int64     `json:"quantity"`
	}
)

func (Received) EventName() string            { return "stock.received.v1" }
func (Adjusted) EventName() string            { return "stock.adjusted.v1" }
func (Reserved) EventName() string            { return "stock.reserved.v1" }
func (ReservationRejected) EventName() string { return "stock.reservation_rejected.v1" }
func (Released) EventName() string            { return "stock.released.v1" }
func (Shipped) EventName() string             { return "stock.shipped.v1" }

// Events is the vocabulary of the inventory service.
var Events = domain.EventsOf(Received{}, Adjusted{}, Reserved{}, ReservationRejected{}, Released{}, Shipped{})

// Limit bounds how many units of one SKU can be available when more are taken in, so that sums never overflow.
const Limit = 1 << 53

// Stock is the state of one SKU. The zero value has never been received.
type Stock struct {
	Known     bool // something has happened to it, if only a rejected reservation
	Available int64
	reserved  reservations
}

// Evolve is the stock after one more fact. It never refuses one, and the receiver stays as it was.
func (s Stock) Evolve(event domain.Event) Stock {
	s.Known = true
	switch e := event.(type) {
	case Received:
		s.Available += e.Quantity
	case Adjusted:
		s.Available += e.Delta
	case Reserved:
		s.Available -= e.Quantity
		s.reserved = s.reserved.with(e.Order, e.Quantity)
	case Released:
		s.Available += e.Quantity
		s.reserved = s.reserved.without(e.Order)
	case Shipped:
		s.reserved = s.reserved.without(e.Order)
	}
	return s
}

// Closed is false: a SKU's life has no end.
func (s Stock) Closed() bool { return false }

// Reserved is what is set aside for the order, 0 when nothing is.
func (s Stock) Reserved(order uuid.UUID) int64 { return s.reserved.of(order) }

// DecideReceive takes units in.
func (s Stock) DecideReceive(quantity int64) ([]domain.Event, error) {
	if s.Available+quantity > Limit {
		return nil, domain.Refuse("too-much-stock", "no SKU can have that many units")
	}
	return []domain.Event{Received{quantity}}, nil
}

// DecideAdjust corrects the count; it cannot take what is not there or what is promised.
func (s Stock) DecideAdjust(delta int64, reason string) ([]domain.Event, error) {
	if !s.Known {
		return nil, domain.ErrUnknown
	}
	if s.Available+delta < 0 {
		return nil, domain.Refuse("not-enough-stock", "fewer units are available than the adjustment takes away")
	}
	if s.Available+delta > Limit {
		return nil, domain.Refuse("too-much-stock", "no SKU can have that many units")
	}
	return []domain.Event{Adjusted{delta, reason}}, nil
}

// DecideReserve sets all of the units aside for the order, or rejects it, which is a fact as well: the order waits
// for either.
func (s Stock) DecideReserve(order uuid.UUID, quantity int64) ([]domain.Event, error) {
	if s.Reserved(order) > 0 {
		return nil, nil
	}
	if s.Available < quantity {
		return []domain.Event{ReservationRejected{order, quantity, s.Available}}, nil
	}
	return []domain.Event{Reserved{order, quantity}}, nil
}

// DecideRelease puts back what is set aside for the order.
func (s Stock) DecideRelease(order uuid.UUID) ([]domain.Event, error) {
	if q := s.Reserved(order); q > 0 {
		return []domain.Event{Released{order, q}}, nil
	}
	return nil, nil
}

// DecideShip sends off what is set aside for the order.
func (s Stock) DecideShip(order uuid.UUID) ([]domain.Event, error) {
	if q := s.Reserved(order); q > 0 {
		return []domain.Event{Shipped{order, q}}, nil
	}
	return nil, nil
}
