package projections

import (
	"context"
	"net/http"

	"github.com/danielgtaylor/huma/v2"
	"github.com/jackc/pgx/v5"

	"wharf/domain"
	"wharf/domain/inventory"
)

// Stock is the units of every SKU: received + adjusted = available + reserved + shipped. A SKU that was never received,
// only asked for, is all zeros.
var Stock = Define(Spec[stockKey, stockRow]{
	Name: "stock", Version: 1,
	Events: map[string]domain.Events{InventoryTopic: inventory.Events},
	Keys:   func(e Event) []stockKey { return []stockKey{{e.Stream}} },
	Apply: func(_ stockKey, s stockRow, e Event) stockRow {
		s.Version = e.Version
		switch f := e.Fact.(type) {
		case inventory.Received:
			s.Received += f.Quantity
			s.Available += f.Quantity
		case inventory.Adjusted:
			s.Adjusted += f.Delta
			s.Available += f.Delta
		case inventory.Reserved:
			s.Available -= f.Quantity
			s.Reserved += f.Quantity
		case inventory.Released:
			s.Reserved -= f.Quantity
			s.Available += f.Quantity
		case inventory.Shipped:
			s.Reserved -= f.Quantity
			s.Shipped += f.Quantity
		}
		return s
	},
})

type stockKey struct {
	SKU string `db:"sku text"`
}

type stockRow struct {
	Received  int64 `db:"received bigint"`
	Adjusted  int64 `db:"adjusted bigint"`
	Available int64 `db:"available bigint"`
	Reserved  int64 `db:"reserved bigint"`
	Shipped   int64 `db:"shipped bigint"`
	Version   int64 `db:"version bigint"`
}

// StockItem is a SKU as the API shows it, in units.
type StockItem struct {
	SKU       string `json:"sku"`
	Received  int64  `json:"received"`
	Adjusted  int64  `json:"adjusted" doc:"The sum of all corrections, signed."`
	Available int64  `json:"available"`
	Reserved  int64  `json:"reserved"`
	Shipped   int64  `json:"shipped"`
	Version   int64  `json:"version"`
	Stale     bool   `json:"stale,omitempty" doc:"True while events of it could not be applied: this is how it is without them, and what came after them on their stream."`
}

const selectStock = "SELECT sku, received, adjusted, available, reserved, shipped, version, stale FROM wharf_read.stock"

func scanStock(row pgx.Row) (s StockItem, err error) {
	err = row.Scan(&s.SKU, &s.Received, &s.Adjusted, &s.Available, &s.Reserved, &s.Shipped, &s.Version, &s.Stale)
	return s, err
}

type stockList struct {
	Consistency
	Page[stockCursor]
}

type stockOne struct {
	Consistency
	SKU sku `path:"sku" doc:"As it is spelled, percent-encoded."`
}

type stockCursor struct {
	SKU string `json:"sku"`
}

func registerStock(api huma.API, db Reads) {
	read(api, db, Stock, huma.Operation{
		OperationID: "list-stock", Method: http.MethodGet, Path: "/stock",
		Summary: "List the stock of every SKU", Description: "By SKU.", Tags: []string{"stock"},
	}, func(ctx context.Context, in *stockList) (*List[StockItem], error) {
		q := newQuery(selectStock)
		return list(ctx, db, in.Page, q, keyset[StockItem, stockCursor]{
			scan:   scanStock,
			after:  func(c stockCursor) { q.where("sku > ?", c.SKU) },
			order:  "sku",
			cursor: func(s StockItem) stockCursor { return stockCursor{s.SKU} },
		})
	})
	read(api, db, Stock, huma.Operation{
		OperationID: "get-stock", Method: http.MethodGet, Path: "/stock/{sku}",
		Summary: "The stock of one SKU", Tags: []string{"stock"},
	}, func(ctx context.Context, in *stockOne) (*One[StockItem], error) {
		s, err := scanStock(db.QueryRow(ctx, selectStock+" WHERE sku = $1", string(in.SKU)))
		return one(s, s.Version, err)
	})
}
