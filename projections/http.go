package projections

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/danielgtaylor/huma/v2"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"wharf/domain"
)

// Register adds every query to the API. Queries read nothing but the views; what the database says of a query that
// fails is returned as it is, wrapped.
func Register(api huma.API, r Reads) {
	registerOrders(api, r)
	registerHistory(api, r)
	registerStock(api, r)
	registerPayments(api, r)
	registerLedger(api, r)
	registerShipments(api, r)
	registerSales(api, r)
	registerStatus(api, r)
}

// Reads is what queries need.
type Reads struct {
	DB
	Positions
	Lags
}

// One is the answer of a query for one entity.
type One[T any] struct {
	ETag string `header:"ETag"`
	Body T
}

func etag(version int64) string { return `"` + strconv.FormatInt(version, 10) + `"` }

// one is the answer that the entity makes; no row at all is an unknown entity.
func one[T any](entity T, version int64, err error) (*One[T], error) {
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return nil, domain.ErrUnknown
	case err != nil:
		return nil, fmt.Errorf("read a %T: %w", entity, err)
	}
	return &One[T]{etag(version), entity}, nil
}

// List is one page of a list.
type List[T any] struct {
	ETag string `header:"ETag"`
	Link string `header:"Link" doc:"rel=\"next\" leads to the next page, as long as there is one."`
	Body struct {
		Items []T `json:"items"`
	}
}

const maxLimit = 200

// Page is the part of a list that is asked for. Pages are cut by the key C, so entities that come in meanwhile make no
// other appear twice or not at all.
type Page[C any] struct {
	Limit  int    `query:"limit" minimum:"1" default:"50" doc:"How many; more than 200 is cut to 200."`
	Cursor string `query:"cursor" maxLength:"2000" doc:"Where to go on: taken from the Link of the page before. Opaque."`

	url   url.URL
	after C
}

// Resolve implements huma.Resolver.
func (p *Page[C]) Resolve(c huma.Context) []error {
	p.url = c.URL()
	if p.Cursor == "" {
		return nil
	}
	var ok bool
	if p.after, ok = decodeCursor[C](p.Cursor); ok {
		return nil
	}
	return []error{&huma.ErrorDetail{Location: "query.cursor", Message: "expected what the Link of the page before says"}}
}

// next is the link to the page that begins after the cursor, with the other parameters as they are.
func (p *Page[C]) next(cursor string) string {
	q := p.url.Query()
	q.Set("cursor", cursor)
	return "<" + p.url.EscapedPath() + "?" + q.Encode() + `>; rel="next"`
}

// keyset says how a list of T is cut into pages by the key C.
type keyset[T, C any] struct {
	scan   func(pgx.Row) (T, error)
	after  func(C) // narrows the query to what comes after the key
	order  string
	cursor func(T) C // the item's key
}

func list[T, C any](ctx context.Context, db DB, p Page[C], q *query, k keyset[T, C]) (*List[T], error) {
	if p.Cursor != "" {
		k.after(p.after)
	}
	limit := min(p.Limit, maxLimit)
	found, err := db.Query(ctx, q.text(k.order, limit+1), q.args...)
	var items []T
	if err == nil {
		scan := func(r pgx.CollectableRow) (T, error) { return k.scan(r) }
		items, err = pgx.AppendRows(make([]T, 0, limit+1), found, scan)
	}
	if err != nil {
		return nil, fmt.Errorf("list %T: %w", items, err)
	}
	out := &List[T]{ETag: etag(0)}
	if len(items) > limit {
		items = items[:limit]
		out.Link = p.next(encodeCursor(k.cursor(items[limit-1])))
	}
	out.Body.Items = items
	return out, nil
}

func encodeCursor(c any) string {
	data, err := json.Marshal(c)
	if err != nil {
		panic(err) // cursors are plain structs
	}
	return base64.RawURLEncoding.EncodeToString(data)
}

// decodeCursor takes only what encodeCursor makes of a C.
func decodeCursor[C any](s string) (c C, ok bool) {
	data, err := base64.RawURLEncoding.DecodeString(s)
	if err != nil || hasNUL(data) || json.Unmarshal(data, &c) != nil {
		return c, false
	}
	return c, encodeCursor(c) == s
}

// query is a SELECT in the making. A ? stands for the next argument.
type query struct {
	from   string
	group  string
	wheres []string
	args   []any
}

func newQuery(from string) *query { return &query{from: from} }

func (q *query) where(condition string, args ...any) {
	for _, a := range args {
		q.args = append(q.args, a)
		condition = strings.Replace(condition, "?", "$"+strconv.Itoa(len(q.args)), 1)
	}
	q.wheres = append(q.wheres, condition)
}

func (q *query) text(order string, limit int) string {
	text := q.from
	if len(q.wheres) > 0 {
		text += " WHERE " + strings.Join(q.wheres, " AND ")
	}
	if q.group != "" {
		text += " GROUP BY " + q.group
	}
	return text + " ORDER BY " + order + " LIMIT " + strconv.Itoa(limit)
}

// OrderID is an order's id in a path: a UUID in any letter case.
type OrderID string

// Schema implements huma's documentation.
func (OrderID) Schema(huma.Registry) *huma.Schema {
	// A pattern rather than the format "uuid", whose error would repeat part of the value.
	s := &huma.Schema{Type: huma.TypeString, PatternDescription: "a UUID",
		Pattern: "^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$"}
	s.PrecomputeMessages()
	return s
}

// UUID is the id, whose form huma has checked.
func (id OrderID) UUID() uuid.UUID { return uuid.MustParse(string(id)) }

// sku is a SKU in a path.
type sku string

// Resolve implements huma's validation.
func (s *sku) Resolve(_ huma.Context, path *huma.PathBuffer) []error {
	return checkText(string(*s), 64, path.String())
}

// Schema implements huma's documentation.
func (sku) Schema(huma.Registry) *huma.Schema { return textSchema(64) }

// name is text in a query parameter.
type name string

// Resolve implements huma's validation.
func (n *name) Resolve(_ huma.Context, path *huma.PathBuffer) []error {
	if *n == "" {
		return nil
	}
	return checkText(string(*n), 200, path.String())
}

// Schema implements huma's documentation.
func (name) Schema(huma.Registry) *huma.Schema { return textSchema(200) }

func textSchema(most int) *huma.Schema {
	return &huma.Schema{Type: huma.TypeString, MinLength: new(1), MaxLength: new(most)}
}

// checkText refuses what no entity can be called. Postgres would not even compare it.
func checkText(s string, most int, location string) []error {
	if !utf8.ValidString(s) || strings.ContainsFunc(s, unicode.IsControl) ||
		utf8.RuneCountInString(s) > most || s == "" {
		return []error{&huma.ErrorDetail{Location: location,
			Message: fmt.Sprintf("expected 1 to %d characters, free of control characters", most)}}
	}
	return nil
}
