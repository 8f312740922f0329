package projections

import (
	"context"
	"net/http"

	"github.com/danielgtaylor/huma/v2"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"wharf/domain"
	"wharf/domain/shipping"
)

// Shipments is the state of every shipment. It is the simplest read model: one row a stream.
var Shipments = Define(Spec[shipmentKey, shipmentRow]{
	Name: "shipments", Version: 1,
	Indexes: []string{"status, order_id"},
	Events:  map[string]domain.Events{ShippingTopic: shipping.Events},
	Brief:   domain.EventsOf(shipping.Created{}, shipping.Delivered{}, shipping.Cancelled{}),
	Keys: func(e Event) []shipmentKey {
		id, ok := orderOf(e)
		if !ok {
			return nil
		}
		return []shipmentKey{{id}}
	},
	Apply: func(_ shipmentKey, row shipmentRow, e Event) shipmentRow {
		s := shipping.Shipment{Status: row.Status, Carrier: row.Carrier, Tracking: row.Tracking}.Evolve(e.Fact)
		return shipmentRow{s.Status, s.Carrier, s.Tracking, e.Version}
	},
})

type shipmentKey struct {
	Order uuid.UUID `db:"order_id uuid"`
}

type shipmentRow struct {
	Status   shipping.Status `db:"status text"`
	Carrier  string          `db:"carrier text"`
	Tracking string          `db:"tracking text"`
	Version  int64           `db:"version bigint"`
}

// Shipment is a shipment as the API shows it.
type Shipment struct {
	Order    uuid.UUID       `json:"order" format:"uuid"`
	Status   shipping.Status `json:"status" enum:"created,dispatched,delivered,cancelled"`
	Carrier  string          `json:"carrier" doc:"Empty until it is dispatched."`
	Tracking string          `json:"tracking" doc:"Empty until it is dispatched."`
	Version  int64           `json:"version"`
	Stale    bool            `json:"stale,omitempty" doc:"True while events of it could not be applied: this is how it is without them, and what came after them on their stream."`
}

const selectShipments = "SELECT order_id, status, carrier, tracking, version, stale FROM wharf_read.shipments"

func scanShipment(row pgx.Row) (s Shipment, err error) {
	err = row.Scan(&s.Order, &s.Status, &s.Carrier, &s.Tracking, &s.Version, &s.Stale)
	return s, err
}

type shipmentList struct {
	Consistency
	Page[shipmentCursor]
	Status string `query:"status" enum:"created,dispatched,delivered,cancelled" doc:"Only those in this state."`
}

type shipmentOne struct {
	Consistency
	Order OrderID `path:"order"`
}

type shipmentCursor struct {
	Order uuid.UUID `json:"shipment"`
}

func registerShipments(api huma.API, db Reads) {
	read(api, db, Shipments, huma.Operation{
		OperationID: "list-shipments", Method: http.MethodGet, Path: "/shipments",
		Summary: "List shipments", Description: "By order id.", Tags: []string{"shipments"},
	}, func(ctx context.Context, in *shipmentList) (*List[Shipment], error) {
		q := newQuery(selectShipments)
		if in.Status != "" {
			q.where("status = ?", in.Status)
		}
		return list(ctx, db, in.Page, q, keyset[Shipment, shipmentCursor]{
			scan:   scanShipment,
			after:  func(c shipmentCursor) { q.where("order_id > ?", c.Order) },
			order:  "order_id",
			cursor: func(s Shipment) shipmentCursor { return shipmentCursor{s.Order} },
		})
	})
	read(api, db, Shipments, huma.Operation{
		OperationID: "get-shipment", Method: http.MethodGet, Path: "/shipments/{order}",
		Summary: "The shipment of an order", Tags: []string{"shipments"},
	}, func(ctx context.Context, in *shipmentOne) (*One[Shipment], error) {
		s, err := scanShipment(db.QueryRow(ctx, selectShipments+" WHERE order_id = $1", in.Order.UUID()))
		return one(s, s.Version, err)
	})
}
