package orders

import (
	"time"

	"wharf/domain"
)

// Line is one line of an order. A SKU may stand on several lines, at different prices.
type Line struct {
	SKU       string       `json:"sku"`
	Quantity  int64        `json:"quantity"`
	UnitPrice domain.Money `json:"unit_price"`
}

// The events of an order. Placed, Confirmed, Shipped and every ending carry Items, the quantities summed per SKU and
// sorted by it, so that a reader can name the stock items concerned without knowing the order.
type (
	// Placed opens the stream.
	Placed struct {
		Customer string            `json:"customer"`
		Lines    []Line            `json:"lines"`
		Items    []domain.Quantity `json:"items"`
		Total    domain.Money      `json:"total"`
		Deadline time.Time         `json:"deadline"` // not confirmed by then, it expires
	}
	// ItemReserved says that inventory holds the whole quantity of one SKU for this order.
	ItemReserved struct {
		SKU string `json:"sku"`
	}
	// StockConfirmed says that every item is reserved.
	StockConfirmed struct {
		Total domain.Money `json:"total"`
	}
	// Confirmed says that it is paid (authorised) and may be shipped.
	Confirmed struct {
		Items []domain.Quantity `json:"items"`
	}
	// CancellationRequested asks the shipment, which decides.
	CancellationRequested struct {
		Reason string `json:"reason"`
	}
	// Shipped says that the shipment is on its way.
	Shipped struct {
		Carrier  string            `json:"carrier"`
		Tracking string            `json:"tracking"`
		Items    []domain.Quantity `json:"items"`
		Total    domain.Money      `json:"total"`
	}
	// Delivered ends it well.
	Delivered struct {
		Items []domain.Quantity `json:"items"`
	}
	// Rejected ends it because stock or payment was refused.
	Rejected struct {
		Reason string            `json:"reason"`
		Items  []domain.Quantity `json:"items"`
	}
	// Cancelled ends it at the customer's request.
	Cancelled struct {
		Reason string            `json:"reason"`
		Items  []domain.Quantity `json:"items"`
	}
	// Expired ends it because it was not confirmed in time.
	Expired struct {
		Reason string            `json:"reason"`
		Items  []domain.Quantity `json:"items"`
	}
)

func (Placed) EventName() string                { return "order.placed.v1" }
func (ItemReserved) EventName() string          { return "order.item_reserved.v1" }
func (StockConfirmed) EventName() string        { return "order.stock_confirmed.v1" }
func (Confirmed) EventName() string             { return "order.confirmed.v1" }
func (CancellationRequested) EventName() string { return "order.cancellation_requested.v1" }
func (Shipped) EventName() string               { return "order.shipped.v1" }
func (Delivered) EventName() string             { return "order.delivered.v1" }
func (Rejected) EventName() string              { return "order.rejected.v1" }
func (Cancelled) EventName() string             { return "order.cancelled.v1" }
func (Expired) EventName() string               { return "order.expired.v1" }

// Events is the vocabulary of the orders service.
var Events = domain.EventsOf(Placed{}, ItemReserved{}, StockConfirmed{}, Confirmed{}, CancellationRequested{},
	Shipped{}, Delivered{}, Rejected{}, Cancelled{}, Expired{})
