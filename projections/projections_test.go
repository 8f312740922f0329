package projections

import (
	stdcmp "cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	fastjson "github.com/go-json-experiment/json/v1"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgtype"
	"pgregory.net/rapid"

	"wharf/domain"
	"wharf/domain/inventory"
	"wharf/domain/orders"
	"wharf/domain/payments"
	"wharf/domain/shipping"
)

// told is what a partition's topics tell: events by topic, in order.
type told map[string][]domain.Recorded

func (w told) tell(topic, stream string, version int64, fact domain.Event) {
	data, err := domain.Encode(fact)
	if err != nil {
		panic(err)
	}
	seq := int64(len(w[topic]) + 1)
	w[topic] = append(w[topic], domain.Recorded{
		ID: uuid.NewSHA1(uuid.Nil, fmt.Append(nil, topic, seq)), Name: fact.EventName(), Service: topic[:len(topic)-7], Stream: stream,
		Version: version, Time: time.Date(2026, 1, 1+int(seq%3), 0, 0, 0, int(seq)*1000, time.UTC),
		Position: domain.Position{Topic: topic, Partition: 3, Seq: seq}, Data: data,
	})
}

// drawTold makes up what the topics of a partition tell of some streams, which need not make sense across topics: a
// read model must not rely on it.
func drawTold(t *rapid.T) told {
	w := told{}
	ids := []string{uuid.NewSHA1(uuid.Nil, []byte("one")).String(), uuid.NewSHA1(uuid.Nil, []byte("two")).String()}
	order := uuid.MustParse(ids[0])
	money := rapid.Custom(func(t *rapid.T) domain.Money {
		return domain.Money{Amount: rapid.Int64Range(0, 1000).Draw(t, "amount"), Currency: rapid.SampledFrom([]string{"GBP", "USD"}).Draw(t, "currency")}
	})
	for topic, streams := range map[string][]string{OrdersTopic: ids, PaymentsTopic: ids, ShippingTopic: ids, InventoryTopic: {"MUG", "CUP"}} {
		versions := map[string]int64{}
		for range rapid.IntRange(0, 8).Draw(t, "events of "+topic) {
			stream := rapid.SampledFrom(streams).Draw(t, "stream")
			m, q := money.Draw(t, "money"), rapid.Int64Range(1, 9).Draw(t, "quantity")
			items := []domain.Quantity{{SKU: "MUG", Quantity: q}}
			postings := []payments.Posting{{Account: "a", Amount: m}, {Account: "b", Amount: domain.Money{Amount: -m.Amount, Currency: m.Currency}}}
			var facts []domain.Event
			switch topic {
			case OrdersTopic:
				facts = []domain.Event{
					orders.Placed{Customer: "C", Lines: []orders.Line{{SKU: "MUG", Quantity: q, UnitPrice: m}}, Items: items, Total: m},
					orders.ItemReserved{SKU: "MUG"}, orders.StockConfirmed{Total: m}, orders.Confirmed{Items: items},
					orders.CancellationRequested{Reason: "asked"}, orders.Shipped{Items: items, Total: m}, orders.Delivered{Items: items},
					orders.Rejected{Reason: "none left"}, orders.Cancelled{Reason: "asked"}, orders.Expired{Reason: "late"}}
			case PaymentsTopic:
				facts = []domain.Event{
					payments.AuthorizationRequested{Amount: m}, payments.Authorized{Amount: m, Postings: postings}, payments.Declined{Reason: "no"},
					payments.CaptureRequested{Amount: m}, payments.Captured{Amount: m, Postings: postings}, payments.CaptureDeclined{},
					payments.VoidRequested{}, payments.Voided{Amount: m, Postings: postings}, payments.RefundRequested{Amount: m},
					payments.Refunded{Amount: m, Postings: postings}, payments.RefundDeclined{Amount: m}}
			case ShippingTopic:
				facts = []domain.Event{shipping.Created{Items: items}, shipping.Dispatched{Carrier: "Post", Tracking: "1", Items: items},
					shipping.Delivered{}, shipping.Cancelled{}}
			case InventoryTopic:
				facts = []domain.Event{inventory.Received{Quantity: q}, inventory.Adjusted{Delta: -q, Reason: "lost"},
					inventory.Reserved{Order: order, Quantity: q}, inventory.ReservationRejected{Order: order, Quantity: q},
					inventory.Released{Order: order, Quantity: q}, inventory.Shipped{Order: order, Quantity: q}}
			}
			versions[stream]++
			w.tell(topic, stream, versions[stream], rapid.SampledFrom(facts).Draw(t, "fact"))
		}
	}
	return w
}

// interleave puts the topics' events into one order that keeps each topic's own.
func (w told) interleave(t *rapid.T) (all []domain.Recorded) {
	left := map[string][]domain.Recorded{}
	for topic, events := range w {
		left[topic] = events
	}
	for {
		var topics []string
		for _, topic := range Topics {
			if len(left[topic]) > 0 {
				topics = append(topics, topic)
			}
		}
		if len(topics) == 0 {
			return all
		}
		topic := rapid.SampledFrom(topics).Draw(t, "next")
		all, left[topic] = append(all, left[topic][0]), left[topic][1:]
	}
}

// foldRows is the rows that the events make, by key.
func foldRows(t interface{ Fatal(...any) }, m Model, events []domain.Recorded) map[any]any {
	rows := map[any]any{}
	for _, r := range events {
		e, listens, err := m.Decode(r)
		if err != nil {
			t.Fatal(err)
		}
		if !listens {
			continue
		}
		for _, k := range m.Touched(e) {
			if rows[k] == nil {
				rows[k] = m.New()
			}
			m.Apply(k, rows[k], e)
		}
	}
	return rows
}

// fold is the rows that the events make, as the columns of their table.
func fold(t interface{ Fatal(...any) }, m Model, events []domain.Recorded) map[string][]any {
	return columns(t, m, foldRows(t, m, events))
}

// columns is the rows as the columns of their table.
func columns(t interface{ Fatal(...any) }, m Model, rows map[any]any) map[string][]any {
	values := map[string][]any{}
	for k, row := range rows {
		v, err := m.Values(k, row)
		if err != nil {
			t.Fatal(err)
		}
		values[fmt.Sprint(k)] = v
	}
	return values
}

func TestApplyAcceptsAnyInterleavingOfItsTopics(t *testing.T) {
	for _, m := range All {
		t.Run(m.Name, func(t *testing.T) {
			rapid.Check(t, func(t *rapid.T) {
				w := drawTold(t)
				if diff := cmp.Diff(fold(t, m, w.interleave(t)), fold(t, m, w.interleave(t)), cmpopts.EquateEmpty()); diff != "" {
					t.Fatal(diff)
				}
			})
		})
	}
}

// What went to the table and came back folds on as if it had stayed in memory, so that it does not matter which rows
// a task keeps.
func TestRowsGoThroughTheirColumnsUnchanged(t *testing.T) {
	for _, m := range All {
		t.Run(m.Name, func(t *testing.T) {
			rapid.Check(t, func(t *rapid.T) {
				events := drawTold(t).interleave(t)
				rows := map[any]any{}
				for _, r := range events {
					e, listens, err := m.Decode(r)
					if err != nil {
						t.Fatal(err)
					}
					if !listens {
						continue
					}
					for _, k := range m.Touched(e) {
						row := m.New()
						if old := rows[k]; old != nil {
							values, err := m.Values(k, old)
							if err != nil {
								t.Fatal(err)
							}
							var key any
							if key, row, err = m.Scan(scanned{m, values}); err != nil {
								t.Fatal(err)
							}
							if key != k {
								t.Fatalf("the key %v came back as %v", k, key)
							}
						}
						m.Apply(k, row, e)
						rows[k] = row
					}
				}
				if diff := cmp.Diff(fold(t, m, events), columns(t, m, rows)); diff != "" {
					t.Fatal(diff)
				}
			})
		})
	}
}

// scanned is a row that the database gives back.
type scanned struct {
	Model
	values []any
}

func (s scanned) Scan(dest ...any) error {
	for i, d := range dest {
		v := s.values[i]
		if id, ok := v.([16]byte); ok {
			v = uuid.UUID(id)
		}
		data, err := json.Marshal(v)
		if s.Columns[i].Type == "json" {
			data = []byte(v.(string))
		}
		if err == nil {
			err = json.Unmarshal(data, d)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

type allKey struct {
	Partition int32 `db:"partition int"`
}

// ownJSON has a MarshalJSON that only a pointer has.
type ownJSON struct{ N int }

func (o *ownJSON) MarshalJSON() ([]byte, error) { return fmt.Appendf(nil, "[%d]", o.N), nil }

type allRow struct {
	Text    string          `db:"text text"`
	Short   string          `db:"short varchar(20)"`
	Int     int16           `db:"int int"`
	Big     int64           `db:"big bigint"`
	Bool    bool            `db:"bool bool"`
	Time    time.Time       `db:"time timestamptz"`
	ID      uuid.UUID       `db:"id uuid"`
	JSON    map[string]int  `db:"json json"`
	Own     ownJSON         `db:"own json"`
	RawJSON json.RawMessage `db:"raw_json json"`
}

// Rows are written by INSERT or by COPY, whichever is quicker: they must be the same rows.
func TestCopyWritesWhatInsertWrites(t *testing.T) {
	all := Define(Spec[allKey, allRow]{Name: "all"})
	types := pgtype.NewMap()
	same := func(t interface{ Fatalf(string, ...any) }, m Model, key, row any) {
		values, err := m.Values(key, row)
		copied, copyErr := m.AppendCopy([]byte("x"), key, row)
		if err != nil || copyErr != nil {
			t.Fatalf("%v; %v", err, copyErr)
		}
		want := binary.BigEndian.AppendUint16([]byte("x"), uint16(len(m.Columns)))
		for i, c := range m.Columns {
			name := stdcmp.Or(map[string]string{"int": "int4", "bigint": "int8"}[c.BaseType()], c.BaseType())
			column, ok := types.TypeForName(name)
			if !ok {
				t.Fatalf("there is no type %s", name)
			}
			value, err := types.Encode(column.OID, pgtype.BinaryFormatCode, values[i], nil)
			if err != nil {
				t.Fatalf("%s: %v", c.Name, err)
			}
			want = append(binary.BigEndian.AppendUint32(want, uint32(len(value))), value...)
		}
		if diff := cmp.Diff(want, copied); diff != "" {
			t.Fatalf("%s, the row %+v: pgx writes (-), COPY (+):\n%s", m.Name, row, diff)
		}
	}
	for _, at := range []string{"0000-01-01T00:00:00Z", "1999-12-31T23:59:59.999999Z", "2000-01-01T00:00:00Z", "9999-12-31T23:59:59.999999-23:59", "2026-11-26T12:00:00.123456789+05:30"} {
		when, err := time.Parse(time.RFC3339Nano, at)
		if err != nil {
			t.Fatal(err)
		}
		same(t, all, allKey{math.MaxInt32}, &allRow{"é\"", "x", math.MinInt16, math.MinInt64, true, when, uuid.New(), map[string]int{"<": 1}, ownJSON{7}, []byte(`{"b": 1,"a":[]}`)})
	}
	same(t, all, allKey{math.MinInt32}, &allRow{Time: time.Unix(0, 0), RawJSON: []byte("null")})
	for _, m := range All {
		rapid.Check(t, func(t *rapid.T) {
			for key, row := range foldRows(t, m, drawTold(t).interleave(t)) {
				same(t, m, key, row)
			}
		})
	}
}

func TestAnOrderHasTheStateOfItsPartsBeforeItIsHeardOf(t *testing.T) {
	w, id := told{}, uuid.NewString()
	w.tell(ShippingTopic, id, 1, shipping.Created{})
	w.tell(ShippingTopic, id, 2, shipping.Dispatched{})
	w.tell(PaymentsTopic, id, 1, payments.AuthorizationRequested{Amount: domain.Money{Amount: 5, Currency: "GBP"}})
	w.tell(OrdersTopic, id, 1, orders.Placed{Customer: "C"})
	e, _, err := Orders.Decode(w[ShippingTopic][1])
	if err != nil {
		t.Fatal(err)
	}
	key := Orders.Touched(e)[0]
	row := Orders.New().(*orderRow)
	for _, r := range slices.Concat(w[ShippingTopic], w[PaymentsTopic], w[OrdersTopic]) {
		if row.Version != 0 {
			t.Errorf("it has version %d before it is placed", row.Version)
		}
		e, _, _ := Orders.Decode(r)
		Orders.Apply(key, row, e)
	}
	if row.Shipment != shipping.StatusDispatched || row.Payment.Status != payments.StatusAuthorizing || row.Status != orders.StatusPlaced {
		t.Errorf("the order is %+v", row)
	}
}

func TestCursorsAreTakenOnlyAsTheyWereGiven(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := historyCursor{time.UnixMicro(rapid.Int64Range(0, 1<<50).Draw(t, "time")).UTC(), rapid.String().Draw(t, "topic"),
			rapid.Int32().Draw(t, "partition"), rapid.Int64().Draw(t, "seq")}
		s := encodeCursor(c)
		got, ok := decodeCursor[historyCursor](s)
		if ok && !got.Time.Equal(c.Time) || ok && got.Seq != c.Seq || !ok && storable(c.Topic) {
			t.Fatalf("%+v became %+v %v", c, got, ok)
		}
		i := rapid.IntRange(0, len(s)-1).Draw(t, "at")
		for _, other := range []string{s[:i] + s[i+1:], s[:i] + "!" + s[i:], s + "A", ""} {
			if got, ok := decodeCursor[historyCursor](other); ok && encodeCursor(got) != other {
				t.Fatalf("%q is taken for %+v", other, got)
			}
		}
		if _, ok := decodeCursor[stockCursor](s); ok {
			t.Fatal("a list takes another's cursor")
		}
	})
}

func TestEveryReadModelIsWellDefined(t *testing.T) {
	for _, m := range All {
		if m.Version < 1 || len(m.Topics) == 0 || m.Keys == 0 || len(m.Columns) == m.Keys {
			t.Errorf("%s: %+v", m.Name, m)
		}
		for _, topic := range m.Topics {
			if !slices.Contains(Topics, topic) {
				t.Errorf("%s listens to %s", m.Name, topic)
			}
		}
	}
	for what, define := range map[string]func(){
		"a key across partitions": func() {
			type key struct {
				A string `db:"a text"`
				B string `db:"b text"`
			}
			Define(Spec[key, stockRow]{Name: "x"})
		},
		"a column that cannot hold the field": func() {
			type row struct {
				A int64 `db:"a text"`
			}
			Define(Spec[stockKey, row]{Name: "x"})
		},
		"a column of a type that is not known": func() {
			type row struct {
				A string `db:"a citext"`
			}
			Define(Spec[stockKey, row]{Name: "x"})
		},
		"a field without a column": func() {
			type row struct{ A string }
			Define(Spec[stockKey, row]{Name: "x"})
		},
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s is taken", what)
				}
			}()
			define()
		}()
	}
}

type laggard struct{ Lags }

func (laggard) Oldest(context.Context, string, int32, int64) (time.Time, bool, error) {
	return time.Now().Add(-time.Minute), true, nil
}

func TestManyPartitionsMayLagAtOnce(t *testing.T) {
	ends := map[string]map[int32]int64{OrdersTopic: {}, PaymentsTopic: {}}
	var places [][]place
	s := Status{Items: make([]BuildStatus, 7)}
	for i := range s.Items {
		var ps []place
		for topic := range ends {
			for p := range int32(50) {
				ends[topic][p] = 100
				ps = append(ps, place{topic, p, int64(i % 2)})
			}
		}
		places = append(places, ps)
	}
	for i := range s.Items {
		s.Items[i].State = StateLive
	}
	s.measure(t.Context(), places, ends, laggard{})
	for i, item := range s.Items {
		if want := int64(100 * (100 - i%2)); item.Lag != want || item.LagSeconds < 59 {
			t.Errorf("item %d lags %d events and %v s, want %d and a minute", i, item.Lag, item.LagSeconds, want)
		}
	}
}

func TestPreferencesForWaiting(t *testing.T) {
	for prefer, want := range map[string]time.Duration{
		"": defaultWait, "wait=0": 0, "wait=3": 3 * time.Second, "respond-async, wait=3": 3 * time.Second, "Wait = 5; foo": 5 * time.Second,
		"wait=9": maxWait, "wait=999999999999999999999": maxWait, "wait=-1": defaultWait, "wait=x": defaultWait, "await=1": defaultWait,
	} {
		c := Consistency{Prefer: prefer}
		c.Resolve(nil)
		if c.wait != want {
			t.Errorf("%q: %s, want %s", prefer, c.wait, want)
		}
	}
}

// Read models decode by another library than the write side: what one of them takes and the other refuses would be in the
// log and in no row.
func TestReadModelsDecodeAsTheDomainDoes(t *testing.T) {
	values := []string{`null`, `true`, `"x"`, `""`, `5`, `-0`, `01`, `1.0`, `1e3`, `.5`, `1e`, `+1`, `-`, `9223372036854775807`, `9223372036854775808`, `23000000000000000000`,
		`{}`, `[]`, `[null]`, `[{}]`, `[{"sku":1}]`, `[{"sku":"a"},{"SKU":"b","quantity":2}]`, `[{"sku":"a",}]`, `[1,]`, `[[[]]]`,
		`{"amount":1,"currency":"GBP"}`, `{"amount":1,"amount":2}`, `{"AMOUNT":"1"}`, `{"amount":1`, `"2026-01-01T00:00:00Z"`, `"2026-01-01"`, `"2026/01/01T00:00:00Z"`, `"2026-01-01T00:00:00,5Z"`,
		`"\ud800\udc00 \ud800"`, `"\u00"`, `"\x"`, "\"\x01\"", `"\u0041\n\/"`, `"a`, `nul`, `tru`, `1 2`, ``, ` `, "\ufeff1",
		`"6ba7b810-9dad-11d1-80b4-00c04fd430c8"`, `"{6ba7b810-9dad-11d1-80b4-00c04fd430c8}"`,
		strings.Repeat("[", 20_000) + strings.Repeat("]", 20_000), strings.Repeat("[", 20_000_000)}
	texts := append(values, `{} x`, `{}{}`, ` {} `, "\ufeff{}", `{"a" :1 , "b" : [ ] }`, `{"a"	"b"}`, `{,}`, `{"a":1,}`, `{"ſku":"kelvin"}`)
	for _, events := range []domain.Events{orders.Events, inventory.Events, payments.Events, shipping.Events} {
		for name, typ := range events {
			all := texts
			for i := range typ.NumField() {
				field, _, _ := strings.Cut(typ.Field(i).Tag.Get("json"), ",")
				for _, v := range values {
					all = append(all, fmt.Sprintf(`{"%s":%s}`, field, v), fmt.Sprintf(`{"%s":1,"%s":%s}`, strings.ToUpper(field), field, v))
				}
			}
			for _, text := range all {
				want, refused := events.Decode(name, []byte(text))
				got, err := events.DecodeBy(decode, name, []byte(text))
				if (refused == nil) != (err == nil) || !cmp.Equal(want, got) {
					t.Errorf("%s of %.200s: %v, %v, and in the domain %v, %v", name, text, got, err, want, refused)
				}
				_, refused = opaque(events).Decode(name, []byte(text))
				if _, err = opaque(events).DecodeBy(decode, name, []byte(text)); (refused == nil) != (err == nil) {
					t.Errorf("%s of %.200s: %v, and by encoding/json %v", name, text, err, refused)
				}
			}
		}
	}
}

// Rows of earlier releases, which encoding/json wrote, are compared with new ones by their text. (The two spell what is no
// UTF-8 in different ways; but nothing that was decoded holds any.)
func TestReadModelsEncodeAsEncodingJSON(t *testing.T) {
	same := func(t interface{ Fatalf(string, ...any) }, v any) {
		want, err := json.Marshal(v)
		if got, gotErr := fastjson.Marshal(v); string(got) != string(want) || (err == nil) != (gotErr == nil) {
			t.Fatalf("%s, %v, and by encoding/json %s, %v", got, gotErr, want, err)
		}
	}
	for r := range rune(0x3000) {
		same(t, orders.Line{SKU: "<" + string(r) + ">"})
	}
	same(t, "😀")
	for _, m := range All {
		rapid.Check(t, func(t *rapid.T) {
			for _, row := range foldRows(t, m, drawTold(t).interleave(t)) {
				v := reflect.ValueOf(row).Elem()
				for i := range v.NumField() {
					same(t, v.Field(i).Interface())
				}
			}
		})
	}
}

// Postgres takes no NUL; but a backslash, a u and four zeros are text like any other.
func TestTheTextOfANULIsNone(t *testing.T) {
	w := told{}
	one := uuid.NewSHA1(uuid.Nil, []byte("one")).String()
	for _, customer := range []string{`\u0000`, `a\\u0000`, `\\\u0000\u0000`, `u0000`, "a\x00", "\\\x00", `\u0000` + "\x00"} {
		w.tell(OrdersTopic, one, 1, orders.Placed{Customer: customer})
		last := w[OrdersTopic][len(w[OrdersTopic])-1]
		e, _, err := Orders.Decode(last)
		if strings.Contains(customer, "\x00") != errors.Is(err, ErrUndecodable) {
			t.Errorf("%q, stored as %s: %v", customer, last.Data, err)
		} else if placed, ok := e.Fact.(orders.Placed); ok != (err == nil) || ok && placed.Customer != customer {
			t.Errorf("%q came back as %q", customer, placed.Customer)
		}
		if c, ok := decodeCursor[stockCursor](encodeCursor(stockCursor{customer})); ok == strings.Contains(customer, "\x00") || ok && c.SKU != customer {
			t.Errorf("a page after %q begins after %q (%v)", customer, c.SKU, ok)
		}
	}
}
