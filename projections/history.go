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
	"wharf/domain/inventory"
	"wharf/domain/orders"
	"wharf/domain/payments"
	"wharf/domain/shipping"
)

// History is every event of every order in all four services. What happened to stock for an order lies in the SKU's
// partition, so a row's key is the event's position, and the order an index on it: in the order of time, then position.
// (Time comes first because positions of different topics cannot be compared; a cause is earlier than its effect.)
var History = Define(Spec[historyKey, historyRow]{
	Name: "history", Version: 1, Append: true, Stream: "order_id",
	Events: map[string]domain.Events{
		OrdersTopic:    opaque(orders.Events),
		PaymentsTopic:  opaque(payments.Events),
		ShippingTopic:  opaque(shipping.Events),
		InventoryTopic: inventory.Events,
	},
	Keys: func(e Event) []historyKey {
		order, ok := orderOf(e)
		if e.Topic == InventoryTopic {
			ok = true
			switch f := e.Fact.(type) {
			case inventory.Reserved:
				order = f.Order
			case inventory.ReservationRejected:
				order = f.Order
			case inventory.Released:
				order = f.Order
			case inventory.Shipped:
				order = f.Order
			default:
				ok = false // of no order
			}
		}
		if !ok {
			return nil
		}
		return []historyKey{{order, e.Time, e.Topic, e.Partition, e.Seq}}
	},
	Apply: func(_ historyKey, _ historyRow, e Event) historyRow {
		data := e.Data
		if len(data) == 0 {
			data = []byte("null")
		}
		return historyRow{e.ID, e.Name, e.Service, e.Version, e.Cause.String(), data}
	},
})

// something is an event of which only the stream matters. Decoding it checks that its data is a JSON object, or null.
type something struct{}

func (something) EventName() string { return "" }

// opaque is the vocabulary without what the events say, and with those that cannot be read.
func opaque(events domain.Events) domain.Events {
	all := domain.EventsOf(Unreadable{})
	for name := range events {
		all[name] = reflect.TypeFor[something]()
	}
	return all
}

type historyKey struct {
	Order     uuid.UUID `db:"order_id uuid"`
	Time      time.Time `db:"time timestamptz"`
	Topic     string    `db:"topic text"`
	Partition int32     `db:"partition int"`
	Seq       int64     `db:"seq bigint"`
}

type historyRow struct {
	ID      uuid.UUID       `db:"id uuid"`
	Type    string          `db:"type text"`
	Service string          `db:"service text"`
	Version int64           `db:"version bigint"`
	Cause   string          `db:"cause text"`
	Data    json.RawMessage `db:"data json"`
}

// HistoryEntry is an event as the API shows it.
type HistoryEntry struct {
	ID       uuid.UUID       `json:"id" format:"uuid"`
	Type     string          `json:"type" doc:"The event's stored name." example:"order.placed.v1"`
	Service  string          `json:"service" doc:"Who recorded it."`
	Time     time.Time       `json:"time"`
	Version  int64           `json:"version" doc:"Of its stream, after it."`
	Position string          `json:"position" doc:"Its place in the public log: topic/partition/count." example:"orders.events/3/17"`
	Cause    string          `json:"cause" doc:"The position of the event that it was made for; empty when an HTTP command or a deadline made it."`
	Data     json.RawMessage `json:"data,omitempty" doc:"As recorded. Missing when it cannot be read."`
	Stale    bool            `json:"stale,omitempty" doc:"True while events of the order could not be applied, and are missing here."`

	position domain.Position
}

func scanHistory(row pgx.Row) (h HistoryEntry, err error) {
	p := &h.position
	err = row.Scan(&h.ID, &h.Type, &h.Service, &h.Time, &h.Version, &p.Topic, &p.Partition, &p.Seq, &h.Cause, &h.Data, &h.Stale)
	h.Position, h.Time = p.String(), h.Time.UTC()
	if string(h.Data) == "null" {
		h.Data = nil
	}
	return h, err
}

type historyList struct {
	Consistency
	ID OrderID `path:"id"`
	Page[historyCursor]
}

type historyCursor struct {
	Time      time.Time `json:"time"`
	Topic     string    `json:"topic"`
	Partition int32     `json:"partition"`
	Seq       int64     `json:"seq"`
}

func registerHistory(api huma.API, db Reads) {
	read(api, db, History, huma.Operation{
		OperationID: "list-order-history", Method: http.MethodGet, Path: "/orders/{id}/history",
		Summary:     "Every event of an order in all services",
		Description: "By time, then position: causes come before their effects.", Tags: []string{"orders"},
	}, func(ctx context.Context, in *historyList) (*List[HistoryEntry], error) {
		q := newQuery(`SELECT id, type, service, time, version, topic, partition, seq, cause, data, stale
			FROM wharf_read.history`)
		q.where("order_id = ?", in.ID.UUID())
		out, err := list(ctx, db, in.Page, q, keyset[HistoryEntry, historyCursor]{
			scan: scanHistory,
			after: func(c historyCursor) {
				q.where("(time, topic, partition, seq) > (?, ?, ?, ?)", c.Time, c.Topic, c.Partition, c.Seq)
			},
			order: "time, topic, partition, seq",
			cursor: func(h HistoryEntry) historyCursor {
				return historyCursor{h.Time, h.position.Topic, h.position.Partition, h.position.Seq}
			},
		})
		if err == nil && len(out.Body.Items) == 0 && in.Cursor == "" {
			return nil, domain.ErrUnknown
		}
		return out, err
	})
}
