// Package shipping answers the question "what can happen to an order's shipment?". Read this file first. The
// shipment is the one arbiter between dispatch and cancellation: whichever its stream records first has won.
package shipping

import "wharf/domain"

// The events of a shipment, whose id is the order's.
type (
	// Created says that there is something to pack.
	Created struct {
		Items []domain.Quantity `json:"items"`
	}
	// Dispatched says that it left the house.
	Dispatched struct {
		Carrier  string            `json:"carrier"`
		Tracking string            `json:"tracking"`
		Items    []domain.Quantity `json:"items"`
	}
	// Delivered says that it arrived.
	Delivered struct{}
	// Cancelled says that it will never leave.
	Cancelled struct{}
)

func (Created) EventName() string    { return "shipment.created.v1" }
func (Dispatched) EventName() string { return "shipment.dispatched.v1" }
func (Delivered) EventName() string  { return "shipment.delivered.v1" }
func (Cancelled) EventName() string  { return "shipment.cancelled.v1" }

// Events is the vocabulary of the shipping service.
var Events = domain.EventsOf(Created{}, Dispatched{}, Delivered{}, Cancelled{})

// Status is where a shipment stands. Its values are what the HTTP API shows.
type Status string

// The life of a shipment.
const (
	StatusCreated    Status = "created"
	StatusDispatched Status = "dispatched"
	StatusDelivered  Status = "delivered"
	StatusCancelled  Status = "cancelled"
)

// Shipment is the state that decisions need. The zero value was never created.
type Shipment struct {
	Status            Status
	Carrier, Tracking string
	items             []domain.Quantity
}

// Evolve is the shipment after one more fact. It never refuses one, and the receiver stays as it was.
func (s Shipment) Evolve(event domain.Event) Shipment {
	switch e := event.(type) {
	case Created:
		return Shipment{Status: StatusCreated, items: e.Items}
	case Dispatched:
		return Shipment{Status: StatusDispatched, Carrier: e.Carrier, Tracking: e.Tracking}
	case Delivered:
		s.Status = StatusDelivered
	case Cancelled:
		return Shipment{Status: StatusCancelled}
	}
	return s
}

// Closed says that nothing can happen to the shipment any more.
func (s Shipment) Closed() bool { return s.Status == StatusDelivered || s.Status == StatusCancelled }

// DecideCreate makes the shipment of a confirmed order.
func (s Shipment) DecideCreate(items []domain.Quantity) ([]domain.Event, error) {
	if s.Status != "" {
		return nil, nil
	}
	return []domain.Event{Created{items}}, nil
}

// DecideDispatch sends it off.
func (s Shipment) DecideDispatch(carrier, tracking string) ([]domain.Event, error) {
	switch s.Status {
	case "":
		return nil, domain.ErrUnknown
	case StatusCreated:
		return []domain.Event{Dispatched{carrier, tracking, s.items}}, nil
	case StatusCancelled:
		return nil, domain.Refuse("shipment-cancelled", "the shipment was cancelled")
	}
	if s.Carrier != carrier || s.Tracking != tracking {
		return nil, domain.Refuse("shipment-dispatched-otherwise", "the shipment was dispatched with another carrier or tracking number")
	}
	return nil, nil
}

// DecideDeliver hands it over.
func (s Shipment) DecideDeliver() ([]domain.Event, error) {
	switch s.Status {
	case "":
		return nil, domain.ErrUnknown
	case StatusDispatched:
		return []domain.Event{Delivered{}}, nil
	case StatusDelivered:
		return nil, nil
	}
	return nil, domain.Refuse("shipment-not-dispatched", "the shipment is "+string(s.Status)+", not dispatched")
}

// DecideCancel gives way to a cancellation, unless the shipment has left; then it does nothing: the order hears of
// the dispatch, and that is the answer.
func (s Shipment) DecideCancel() ([]domain.Event, error) {
	if s.Status == "" || s.Status == StatusCreated {
		return []domain.Event{Cancelled{}}, nil
	}
	return nil, nil
}
