package projections

import (
	"context"
	"net/http"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/jackc/pgx/v5"

	"wharf/domain"
	"wharf/domain/orders"
	"wharf/domain/payments"
)

// Sales is what was sold per UTC day and currency. Captures and refunds are booked on their own day, orders and units
// on the day on which they left. Orders of all partitions are sold on one day, so each partition has rows of its own,
// and the query sums them.
var Sales = Define(Spec[salesKey, salesRow]{
	Name: "sales", Version: 1,
	Events: map[string]domain.Events{
		OrdersTopic:   domain.EventsOf(orders.Shipped{}),
		PaymentsTopic: domain.EventsOf(payments.Captured{}, payments.Refunded{}),
	},
	Keys: func(e Event) []salesKey {
		var currency string
		switch f := e.Fact.(type) {
		case orders.Shipped:
			currency = f.Total.Currency
		case payments.Captured:
			currency = f.Amount.Currency
		case payments.Refunded:
			currency = f.Amount.Currency
		}
		return []salesKey{{e.Partition, e.Time.Format(time.DateOnly), currency}}
	},
	Apply: func(_ salesKey, s salesRow, e Event) salesRow {
		switch f := e.Fact.(type) {
		case orders.Shipped:
			s.Orders++
			for _, item := range f.Items {
				s.Units += item.Quantity
			}
		case payments.Captured:
			s.Revenue += f.Amount.Amount
		case payments.Refunded:
			s.Revenue -= f.Amount.Amount
		}
		return s
	},
})

type salesKey struct {
	Partition int32  `db:"partition int"`
	Day       string `db:"day text"` // YYYY-MM-DD, which sorts
	Currency  string `db:"currency text"`
}

type salesRow struct {
	Revenue int64 `db:"revenue bigint"`
	Orders  int64 `db:"orders bigint"`
	Units   int64 `db:"units bigint"`
}

// SalesLine is a day's sales in one currency as the API shows it.
type SalesLine struct {
	Date    string       `json:"date" format:"date" doc:"A UTC day."`
	Revenue domain.Money `json:"revenue" doc:"Captured less refunded on that day."`
	Orders  int64        `json:"orders" doc:"That were shipped on that day."`
	Units   int64        `json:"units" doc:"That were shipped on that day."`
	Stale   bool         `json:"stale,omitempty" doc:"True while events could not be applied that may belong here."`
}

func scanSales(row pgx.Row) (s SalesLine, err error) {
	err = row.Scan(&s.Date, &s.Revenue.Currency, &s.Revenue.Amount, &s.Orders, &s.Units, &s.Stale)
	return s, err
}

type salesList struct {
	Consistency
	Page[salesCursor]
	From string `query:"from" format:"date" doc:"The first UTC day wanted, YYYY-MM-DD."`
	To   string `query:"to" format:"date" doc:"The last UTC day wanted, YYYY-MM-DD."`
}

type salesCursor struct {
	Day      string `json:"day"`
	Currency string `json:"currency"`
}

func registerSales(api huma.API, db Reads) {
	read(api, db, Sales, huma.Operation{
		OperationID: "list-sales", Method: http.MethodGet, Path: "/sales",
		Summary: "Sales per day and currency", Description: "By day and currency.", Tags: []string{"sales"},
	}, func(ctx context.Context, in *salesList) (*List[SalesLine], error) {
		q := newQuery(`SELECT day, currency, sum(revenue)::bigint, sum(orders)::bigint, sum(units)::bigint, bool_or(stale)
			FROM wharf_read.sales`)
		q.group = "day, currency"
		if in.From != "" {
			q.where("day >= ?", in.From)
		}
		if in.To != "" {
			q.where("day <= ?", in.To)
		}
		return list(ctx, db, in.Page, q, keyset[SalesLine, salesCursor]{
			scan:   scanSales,
			after:  func(c salesCursor) { q.where("(day, currency) > (?, ?)", c.Day, c.Currency) },
			order:  "day, currency",
			cursor: func(s SalesLine) salesCursor { return salesCursor{s.Date, s.Revenue.Currency} },
		})
	})
}
