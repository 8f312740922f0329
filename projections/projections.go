// Package projections answers the question "what can be read, and how is it made of events?".
//
// A read model is a table, a key and a pure function. Its author writes one file: the row (whose struct tags are the
// table), the events it listens to, Apply, and the query with its route. Copy shipments.go to make the next one, and
// add it to All. This file is the seam to the engine (infra/postgres), which reads events, folds them with Apply and
// stores the rows, in live projection and in replay alike; http.go is what the routes share.
package projections

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"
	fastjson "github.com/go-json-experiment/json/v1" // what encoding/json will be made of: the same in half of the time
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"wharf/domain"
)

// The public topics that read models listen to.
const (
	OrdersTopic    = "orders.events"
	InventoryTopic = "inventory.events"
	PaymentsTopic  = "payments.events"
	ShippingTopic  = "shipping.events"
)

// Topics are all of them: what a projector must hold a partition number of.
var Topics = []string{OrdersTopic, InventoryTopic, PaymentsTopic, ShippingTopic}

// All is every read model of the shop.
var All = []Model{Orders, History, Stock, Payments, Ledger, Shipments, Sales}

// Find is the read model of that name, or an error that says which there are.
func Find(models []Model, name string) (Model, error) {
	names := make([]string, len(models))
	for i, m := range models {
		if m.Name == name {
			return m, nil
		}
		names[i] = m.Name
	}
	likely := slices.MinFunc(names, func(a, b string) int { return distance(a, name) - distance(b, name) })
	if distance(likely, name) <= 2 {
		return Model{}, fmt.Errorf("there is no read model %q: did you mean %s?", name, likely)
	}
	return Model{}, fmt.Errorf("there is no read model %q: there are %s", name, strings.Join(names, ", "))
}

// distance is how many letters must be added, taken away or changed to make b of a (Levenshtein).
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		corner := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := corner
			if a[i] != b[j] {
				cost++
			}
			corner, row[j+1] = row[j+1], min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// ViewSchema is the Postgres schema that queries read: a view per read model, of its name.
const ViewSchema = "wharf_read"

// Event is an event that a read model listens to.
type Event struct {
	domain.Recorded              // Time is in whole microseconds, which is what Postgres keeps
	Fact            domain.Event // decoded Data
}

// Spec is what the author of a read model writes. K is the key and R the rest of a row, two structs whose fields are
// the columns in order; each field has a tag `db:"<column> <Postgres type>"`. A field of the type json may be anything
// that encoding/json writes; all others are strings (text, varchar), whole numbers (int, bigint), bools (bool), times
// (timestamptz) or UUIDs (uuid). No column is ever null.
//
// A projector's task has one partition number of all topics, and alone writes the rows of its keys. So a key is either
// one field, the id of a stream of that partition, or it contains a field Partition int32.
type Spec[K comparable, R any] struct {
	Name    string // of the read model, its table and its view
	Version int    // of this definition, from 1: raise it with every change, so that a new build is made
	Indexes []string

	// Events are the events that it listens to, by public topic. Others never reach it.
	Events map[string]domain.Events
	// Brief are those of the events of which only that they happened matters: they come with a zero Fact, and what they
	// say, which may be long, is not decoded.
	Brief domain.Events
	// Keys names the rows that the event touches; none is fine.
	Keys func(Event) []K
	// Apply is the row after the event; a row that is new is the zero R. It is pure. The order of events is given
	// within a partition of one topic only: it must come to the same row whatever the interleaving of topics.
	Apply func(K, R, Event) R

	// Append says that every event makes rows of its own, which nothing changes later: the key contains the event's
	// position.
	Append bool
	// Stream is the key's column with the id of the stream that a row tells of, if there is one. Events of the stream
	// that could not be applied make the row stale. A row without such a column is stale with any of its partition's.
	Stream string
}

// Column is a column of a read model's table.
type Column struct{ Name, Type string }

// BaseType is the column's type without a length, such as that of a varchar.
func (c Column) BaseType() string {
	base, _, _ := strings.Cut(c.Type, "(")
	return base
}

// Model is a read model as the engine sees it, whatever the types of its rows.
type Model struct {
	Name    string
	Version int
	Topics  []string // that it listens to, sorted
	Columns []Column // those of the key first
	Keys    int      // how many columns the key has
	Indexes []string // column lists
	Append  bool
	Stream  string // the column with the stream that a row tells of; empty if there is none
	Rows           // its rows

	events map[string]domain.Events
	brief  map[string]domain.Event // by name: the zero fact
}

// Rows works on the rows of one read model. A key is comparable; a row is a pointer, nobody else's than the caller's.
type Rows interface {
	Touched(Event) []any                                // keys
	New() any                                           // a new row
	Apply(key, row any, e Event)                        // changes the row, or panics and leaves it as it was
	Clone(row any) any                                  // a row that Apply changes apart from this one
	Values(key, row any) ([]any, error)                 // of all columns, as pgx takes them for the columns' types
	AppendCopy(to []byte, key, row any) ([]byte, error) // the same in the format of COPY
	KeyValues(key any) []any                            // of the key's columns
	KeyText(key any) string                             // the key's columns as text, with / between
	ParseKey(text string) (any, error)                  // reverses KeyText
	Scan(pgx.Row) (key, row any, err error)             // reverses Values
	Owner(key any) (stream string, p *int32)            // where the key lives: with that stream, or in that partition
}

// Define makes the read model. It panics when the spec is no good: a slip of the programmer, found by the first test.
func Define[K comparable, R any](s Spec[K, R]) Model {
	rows := rows[K, R]{spec: s, key: fieldsOf[K](s.Name), row: fieldsOf[R](s.Name), partition: -1}
	for _, f := range rows.key {
		if f.Name == "Partition" && f.Type == reflect.TypeFor[int32]() {
			rows.partition = f.index
		}
	}
	if len(rows.key) != 1 && rows.partition < 0 {
		panic(s.Name + ": the key must be a stream's id or contain the partition")
	}
	m := Model{Name: s.Name, Version: s.Version, Keys: len(rows.key), Indexes: s.Indexes, Append: s.Append, Rows: rows,
		events: s.Events, brief: map[string]domain.Event{}}
	for name := range s.Brief {
		fact, err := s.Brief.Decode(name, []byte("{}"))
		if err != nil {
			panic(s.Name + ": " + err.Error())
		}
		m.brief[name] = fact
	}
	for _, f := range slices.Concat(rows.key, rows.row) {
		m.Columns = append(m.Columns, f.column)
	}
	if m.Stream = s.Stream; m.Stream == "" && rows.partition < 0 {
		m.Stream = rows.key[0].column.Name
	}
	if m.Stream != "" && !slices.ContainsFunc(m.Columns[:m.Keys], func(c Column) bool { return c.Name == m.Stream }) {
		panic(s.Name + ": the column of the stream must be one of the key's")
	}
	for topic := range s.Events {
		m.Topics = append(m.Topics, topic)
	}
	slices.Sort(m.Topics)
	return m
}

// Unreadable stands in the public log for an event whose journal entry is broken. It has no data. Read models that do
// not list it ignore it, but for the count.
type Unreadable struct{}

// EventName implements domain.Event.
func (Unreadable) EventName() string { return "wharf.unreadable.v1" }

// ErrUnreadable says that there is nothing in an event that any program could read: it is to be left out, counted and
// logged.
var ErrUnreadable = errors.New("the event cannot be read")

// ErrUndecodable says that an event of a known name cannot be decoded by this program: it must wait for one that can.
var ErrUndecodable = errors.New("the event cannot be decoded")

// Decode is the event as the read model sees it, and whether it listens to it at all. The error is an ErrUnreadable,
// perhaps with an event that is listened to nevertheless, or an ErrUndecodable with an event that has no Fact.
func (m Model) Decode(r domain.Recorded) (e Event, listens bool, err error) {
	vocabulary := m.events[r.Topic]
	_, listens = vocabulary[r.Name]
	if !listens && r.Name != (Unreadable{}).EventName() {
		return e, false, nil
	}
	r.Time = r.Time.UTC().Truncate(time.Microsecond)
	if !storable(r.Stream) || !storable(r.Service) {
		return e, false, fmt.Errorf("%w: its headers are no text", ErrUnreadable)
	}
	if r.Name == (Unreadable{}).EventName() {
		r.Data = nil
		return Event{r, Unreadable{}}, listens, fmt.Errorf("%w: its journal entry is broken", ErrUnreadable)
	}
	if !utf8.Valid(r.Data) || hasNUL(r.Data) {
		return Event{Recorded: r}, true, fmt.Errorf("%w: its data is no text", ErrUndecodable)
	}
	if fact, brief := m.brief[r.Name]; brief {
		return Event{r, fact}, true, nil
	}
	fact, err := vocabulary.DecodeBy(decode, r.Name, r.Data)
	if err != nil {
		return Event{Recorded: r}, true, fmt.Errorf("%w: %w", ErrUndecodable, err)
	}
	return Event{r, fact}, true, nil
}

// decode is encoding/json's Unmarshal.
func decode(data []byte, to any) error {
	if _, opaque := to.(*something); opaque && isObject(data) {
		return nil
	}
	return fastjson.Unmarshal(data, to)
}

// isObject says that the data is a JSON object.
func isObject(data jsontext.Value) bool {
	return data.Kind() == '{' && data.IsValid(jsontext.AllowDuplicateNames(true))
}

// hasNUL says that a string of the JSON has the character that Postgres does not take: \u0000, with a backslash that is not
// itself escaped by another.
func hasNUL(data []byte) bool {
	escape := []byte(`\u0000`)
	for {
		i := bytes.Index(data, escape)
		if i < 0 {
			return false
		}
		if before := data[:i]; (len(before)-len(bytes.TrimRight(before, `\`)))%2 == 0 {
			return true
		}
		data = data[i+len(escape):]
	}
}

// storable says that Postgres takes the text.
func storable(s string) bool { return utf8.ValidString(s) && !strings.Contains(s, "\x00") }

// rows implements Rows.
type rows[K comparable, R any] struct {
	spec      Spec[K, R]
	key, row  []field
	partition int // index of the key's field Partition, or -1
}

type field struct {
	reflect.StructField
	column Column
	index  int
	encode encoder
}

func fieldsOf[T any](model string) (fields []field) {
	t := reflect.TypeFor[T]()
	for i := range t.NumField() {
		name, typ, ok := strings.Cut(t.Field(i).Tag.Get("db"), " ")
		if !ok {
			panic(fmt.Sprintf("%s: the field %s.%s needs a tag db:\"column type\"", model, t.Name(), t.Field(i).Name))
		}
		column := Column{name, typ}
		encode := encoderOf(t.Field(i).Type, column.BaseType())
		if encode == nil {
			panic(fmt.Sprintf("%s: the field %s.%s is no %s", model, t.Name(), t.Field(i).Name, typ))
		}
		fields = append(fields, field{t.Field(i), column, i, encode})
	}
	return fields
}

func (t rows[K, R]) Touched(e Event) []any {
	keys := t.spec.Keys(e)
	boxed := make([]any, len(keys))
	for i, k := range keys {
		boxed[i] = k
	}
	return boxed
}

func (t rows[K, R]) New() any { return new(R) }

func (t rows[K, R]) Apply(key, row any, e Event) {
	r := row.(*R)
	*r = t.spec.Apply(key.(K), *r, e)
}

func (t rows[K, R]) Clone(row any) any {
	r := *row.(*R)
	return &r
}

func (t rows[K, R]) Values(key, row any) ([]any, error) {
	values := make([]any, 0, len(t.key)+len(t.row))
	values, err := appendValues(values, t.key, reflect.ValueOf(key))
	if err == nil {
		values, err = appendValues(values, t.row, reflect.ValueOf(row).Elem())
	}
	if err != nil {
		return nil, fmt.Errorf("a row of %s: %w", t.spec.Name, err)
	}
	return values, nil
}

func (t rows[K, R]) KeyValues(key any) []any {
	values, err := appendValues(nil, t.key, reflect.ValueOf(key))
	if err != nil {
		panic(err) // a key has no json
	}
	return values
}

func (t rows[K, R]) KeyText(key any) string {
	text := ""
	for i, f := range t.key {
		if i > 0 {
			text += "/"
		}
		switch v := reflect.ValueOf(key).Field(f.index).Interface().(type) {
		case time.Time:
			text += v.Format(time.RFC3339Nano)
		default:
			text += fmt.Sprint(v)
		}
	}
	return text
}

func (t rows[K, R]) ParseKey(text string) (any, error) {
	var key K
	parts := strings.SplitN(text, "/", len(t.key)) // the last one may have slashes in it
	for i, f := range t.key {
		to := reflect.ValueOf(&key).Elem().Field(f.index)
		ok := len(parts) == len(t.key) && parts[i] != ""
		switch {
		case !ok:
		case to.Kind() == reflect.String:
			to.SetString(parts[i])
		case to.CanInt():
			n, err := strconv.ParseInt(parts[i], 10, to.Type().Bits())
			to.SetInt(n)
			ok = err == nil
		default:
			var err error
			switch v := to.Addr().Interface().(type) {
			case *uuid.UUID:
				*v, err = uuid.Parse(parts[i])
			case *time.Time:
				*v, err = time.Parse(time.RFC3339Nano, parts[i])
			default:
				err = errors.ErrUnsupported
			}
			ok = err == nil
		}
		if !ok {
			names := make([]string, len(t.key))
			for i, f := range t.key {
				names[i] = f.column.Name + " (" + f.column.Type + ")"
			}
			return nil, fmt.Errorf("a key of %s reads %s", t.spec.Name, strings.Join(names, "/"))
		}
	}
	return key, nil
}

func appendValues(to []any, fields []field, v reflect.Value) ([]any, error) {
	for _, f := range fields {
		value := v.Field(f.index)
		switch {
		case f.column.Type == "json":
			x := value.Interface()
			data, raw := x.(json.RawMessage) // which stays as it is
			if !raw {
				if value.CanAddr() { // it may have a MarshalJSON of its pointer
					x = value.Addr().Interface()
				}
				var err error
				if data, err = fastjson.Marshal(x); err != nil {
					return nil, err
				}
			}
			to = append(to, string(data))
		case value.Kind() == reflect.String:
			to = append(to, value.String())
		case value.CanInt():
			to = append(to, value.Int())
		default:
			x := value.Interface()
			if id, ok := x.(uuid.UUID); ok {
				x = [16]byte(id)
			}
			to = append(to, x)
		}
	}
	return to, nil
}

func (t rows[K, R]) Scan(from pgx.Row) (any, any, error) {
	var key K
	row := new(R)
	dest := make([]any, 0, len(t.key)+len(t.row))
	for _, f := range t.key {
		dest = append(dest, reflect.ValueOf(&key).Elem().Field(f.index).Addr().Interface())
	}
	for _, f := range t.row {
		dest = append(dest, reflect.ValueOf(row).Elem().Field(f.index).Addr().Interface())
	}
	if err := from.Scan(dest...); err != nil {
		return nil, nil, fmt.Errorf("read a row of %s: %w", t.spec.Name, err)
	}
	return key, row, nil
}

func (t rows[K, R]) Owner(key any) (stream string, p *int32) {
	v := reflect.ValueOf(key)
	if t.partition >= 0 {
		n := int32(v.Field(t.partition).Int())
		return "", &n
	}
	return fmt.Sprint(v.Field(0).Interface()), nil
}

// DB is what queries need of a database: a *pgxpool.Pool is one.
type DB interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// orderOf is the order that the stream of an order, payment or shipment belongs to; false for no order of ours.
func orderOf(e Event) (uuid.UUID, bool) {
	id, err := uuid.Parse(e.Stream)
	return id, err == nil
}
