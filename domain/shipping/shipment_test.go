package shipping_test

import (
	"testing"

	"wharf/domain"
	"wharf/domain/domaintest"
	"wharf/domain/shipping"
)

var items = []domain.Quantity{{SKU: "MUG", Quantity: 8}}

func create(s shipping.Shipment) ([]domain.Event, error) { return s.DecideCreate(items) }
func dispatch(tracking string) func(shipping.Shipment) ([]domain.Event, error) {
	return func(s shipping.Shipment) ([]domain.Event, error) { return s.DecideDispatch("dhl", tracking) }
}

func given(t *testing.T, events ...domain.Event) *domaintest.Scenario[shipping.Shipment] {
	t.Helper()
	return domaintest.Given[shipping.Shipment](t, events...)
}

func TestTheWayOfAShipment(t *testing.T) {
	given(t).
		When(create).Then(shipping.Created{Items: items}).
		When(create).ThenNothing().
		When(dispatch("t1")).Then(shipping.Dispatched{Carrier: "dhl", Tracking: "t1", Items: items}).
		When(dispatch("t1")).ThenNothing().
		When(dispatch("t2")).ThenRefused("shipment-dispatched-otherwise").
		When(shipping.Shipment.DecideDeliver).Then(shipping.Delivered{}).
		When(shipping.Shipment.DecideDeliver).ThenNothing().
		When(dispatch("t1")).ThenNothing().
		When(dispatch("t2")).ThenRefused("shipment-dispatched-otherwise")
}

func TestDispatchAndCancellationExcludeEachOther(t *testing.T) {
	given(t, shipping.Created{Items: items}).
		When(shipping.Shipment.DecideCancel).Then(shipping.Cancelled{}).
		When(shipping.Shipment.DecideCancel).ThenNothing().
		When(dispatch("t1")).ThenRefused("shipment-cancelled").
		When(shipping.Shipment.DecideDeliver).ThenRefused("shipment-not-dispatched")
	given(t, shipping.Created{Items: items}).
		When(dispatch("t1")).
		When(shipping.Shipment.DecideCancel).ThenNothing()
}

func TestTooEarly(t *testing.T) {
	given(t).When(dispatch("t1")).ThenRefused("unknown")
	given(t).When(shipping.Shipment.DecideDeliver).ThenRefused("unknown")
	given(t, shipping.Created{Items: items}).When(shipping.Shipment.DecideDeliver).ThenRefused("shipment-not-dispatched")
}
