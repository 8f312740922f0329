package projections

import (
	"context"
	"encoding/json"
	"net/http"
	"reflect"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"wharf/domain"
	"wharf/domain/orders"
	"wharf/domain/payments"
	"wharf/domain/shipping"
)

// Orders is every order with the state of its payment and shipment. Those may be heard of before the order itself:
// such a row has version 0, and queries do not see it.
var Orders = Define(Spec[orderKey, orderRow]{
	Name: "orders", Version: 1,
	Indexes: []string{"placed_at, id", "customer, placed_at, id", "status, placed_at, id"},
	Events: map[string]domain.Events{
		OrdersTopic: orders.Events, PaymentsTopic: payments.Events, ShippingTopic: shipping.Events,
	},
	Brief: domain.EventsOf(orders.ItemReserved{}, orders.StockConfirmed{}, orders.Confirmed{}, orders.Shipped{}, orders.Delivered{},
		shipping.Created{}, shipping.Dispatched{}, shipping.Delivered{}, shipping.Cancelled{}),
	Keys: func(e Event) []orderKey {
		id, ok := orderOf(e)
		if !ok {
			return nil
		}
		return []orderKey{{id}}
	},
	Apply: func(_ orderKey, o orderRow, e Event) orderRow {
		switch e.Topic {
		case PaymentsTopic:
			o.Payment, o.PaymentVersion = o.Payment.Evolve(e.Fact), e.Version
			return o
		case ShippingTopic:
			o.Shipment, o.ShipmentVersion = shipping.Shipment{Status: o.Shipment}.Evolve(e.Fact).Status, e.Version
			return o
		}
		o.Version, o.UpdatedAt = e.Version, e.Time
		switch f := e.Fact.(type) {
		case orders.Placed:
			o.Customer, o.Lines, o.PlacedAt = f.Customer, f.Lines, e.Time
			o.Total, o.Currency = f.Total.Amount, f.Total.Currency
			o.Status = orders.StatusPlaced
		case orders.StockConfirmed:
			o.Status = orders.StatusStockConfirmed
		case orders.Confirmed:
			o.Status = orders.StatusConfirmed
		case orders.CancellationRequested:
			o.Status, o.Reason = orders.StatusCancelling, f.Reason
		case orders.Shipped:
			o.Status, o.Reason = orders.StatusShipped, ""
		case orders.Delivered:
			o.Status = orders.StatusDelivered
		case orders.Rejected:
			o.Status, o.Reason = orders.StatusRejected, f.Reason
		case orders.Cancelled:
			o.Status, o.Reason = orders.StatusCancelled, f.Reason
		case orders.Expired:
			o.Status, o.Reason = orders.StatusExpired, f.Reason
		}
		return o
	},
})

type orderKey struct {
	ID uuid.UUID `db:"id uuid"`
}

type orderRow struct {
	Customer        string           `db:"customer text"`
	Status          orders.Status    `db:"status text"`
	Reason          string           `db:"reason text"`
	Lines           []orders.Line    `db:"lines json"`
	Total           int64            `db:"total bigint"`
	Currency        string           `db:"currency text"`
	Version         int64            `db:"version bigint"`
	PlacedAt        time.Time        `db:"placed_at timestamptz"`
	UpdatedAt       time.Time        `db:"updated_at timestamptz"` // of the order's own last event
	Payment         payments.Payment `db:"payment json"`
	PaymentVersion  int64            `db:"payment_version bigint"`
	Shipment        shipping.Status  `db:"shipment_status text"`
	ShipmentVersion int64            `db:"shipment_version bigint"`
}

// Order is an order as the API shows it. Lists leave the lines out.
type Order struct {
	ID        uuid.UUID     `json:"id" format:"uuid"`
	Customer  string        `json:"customer"`
	Status    orders.Status `json:"status" enum:"placed,stock_confirmed,confirmed,cancelling,shipped,delivered,rejected,cancelled,expired"`
	Reason    string        `json:"reason" doc:"Of a cancellation that is asked for, or of an ending without delivery; else empty."`
	Lines     []orders.Line `json:"lines,omitempty"`
	Total     domain.Money  `json:"total"`
	Payment   Part          `json:"payment" doc:"Its status is empty until one is asked for."`
	Shipment  Part          `json:"shipment" doc:"Its status is empty until there is one."`
	Version   int64         `json:"version"`
	PlacedAt  time.Time     `json:"placed_at"`
	UpdatedAt time.Time     `json:"updated_at"`
	Stale     bool          `json:"stale,omitempty" doc:"True while events of it could not be applied: this is how it is without them, and what came after them on their stream."`
}

// orderWithLines is an Order as a query answers it: with its lines as they are stored.
type orderWithLines struct {
	Order
	Lines linesText `json:"lines"`
}

type linesText json.RawMessage

// MarshalJSON implements json.Marshaler.
func (t linesText) MarshalJSON() ([]byte, error) {
	if string(t) == "null" { // its placing was given up
		return []byte("[]"), nil
	}
	return t, nil
}

// Schema implements huma's documentation.
func (linesText) Schema(r huma.Registry) *huma.Schema {
	return r.Schema(reflect.TypeFor[[]orders.Line](), true, "Line")
}

// Part is the state of an order's payment or shipment.
type Part struct {
	Status  string `json:"status"`
	Version int64  `json:"version"`
}

const orderColumns = `id, customer, status, reason, total, currency, payment->>'Status', payment_version,
	shipment_status, shipment_version, version, placed_at, updated_at, stale`

func scanOrder(row pgx.Row, more ...any) (o Order, err error) {
	err = row.Scan(append([]any{&o.ID, &o.Customer, &o.Status, &o.Reason, &o.Total.Amount, &o.Total.Currency,
		&o.Payment.Status, &o.Payment.Version, &o.Shipment.Status, &o.Shipment.Version, &o.Version, &o.PlacedAt, &o.UpdatedAt, &o.Stale},
		more...)...)
	o.PlacedAt, o.UpdatedAt = o.PlacedAt.UTC(), o.UpdatedAt.UTC()
	return o, err
}

type orderList struct {
	Consistency
	Page[orderCursor]
	Customer name   `query:"customer" doc:"Only those of this customer."`
	Status   string `query:"status" enum:"placed,stock_confirmed,confirmed,cancelling,shipped,delivered,rejected,cancelled,expired" doc:"Only those in this state."`
}

type orderOne struct {
	Consistency
	ID OrderID `path:"id"`
}

type orderCursor struct {
	PlacedAt time.Time `json:"placed_at"`
	ID       uuid.UUID `json:"order"`
}

func registerOrders(api huma.API, db Reads) {
	read(api, db, Orders, huma.Operation{
		OperationID: "list-orders", Method: http.MethodGet, Path: "/orders",
		Summary: "List orders", Description: "Newest first, without their lines.", Tags: []string{"orders"},
	}, func(ctx context.Context, in *orderList) (*List[Order], error) {
		q := newQuery("SELECT " + orderColumns + " FROM wharf_read.orders")
		q.where("version > 0")
		if in.Customer != "" {
			q.where("customer = ?", string(in.Customer))
		}
		if in.Status != "" {
			q.where("status = ?", in.Status)
		}
		return list(ctx, db, in.Page, q, keyset[Order, orderCursor]{
			scan:   func(row pgx.Row) (Order, error) { return scanOrder(row) },
			after:  func(c orderCursor) { q.where("(placed_at, id) < (?, ?)", c.PlacedAt, c.ID) },
			order:  "placed_at DESC, id DESC",
			cursor: func(o Order) orderCursor { return orderCursor{o.PlacedAt, o.ID} },
		})
	})
	read(api, db, Orders, huma.Operation{
		OperationID: "get-order", Method: http.MethodGet, Path: "/orders/{id}",
		Summary: "An order with its lines", Tags: []string{"orders"},
	}, func(ctx context.Context, in *orderOne) (*One[orderWithLines], error) {
		var o orderWithLines
		var err error
		o.Order, err = scanOrder(db.QueryRow(ctx, "SELECT "+orderColumns+
			", lines FROM wharf_read.orders WHERE version > 0 AND id = $1", in.ID.UUID()), (*[]byte)(&o.Lines))
		return one(o, o.Version, err)
	})
}
