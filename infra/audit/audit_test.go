package audit

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"wharf/domain"
	"wharf/domain/orders"
	"wharf/infra/shop"
	"wharf/infra/shop/shoptest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type object = map[string]any

// town is a shop with an order in every state of rest, and their ids.
type town struct {
	*shoptest.Shop
	url                                     string
	client                                  *shop.Client
	confirmed, shipped, delivered, refunded string
	rejected, declined, cancelled, called   string
}

func newTown(t *testing.T) *town {
	t.Helper()
	ctx := t.Context()
	s := &town{Shop: shoptest.New()}
	s.url = s.Start(t)
	var err error
	if s.client, err = shop.New(s.url, 1); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.client.Close)
	decline := false
	s.Decline = func(string) bool { return decline }
	must := func(r shop.Receipt, err error) string {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return r.ID
	}
	settle := func() {
		t.Helper()
		if _, why, err := s.client.Resting(ctx); why != "" || err != nil {
			t.Fatal(why, err)
		}
	}
	place := func(quantity int64) string {
		id := must(s.client.Place(ctx, "", shop.NewOrder{Customer: "c", Lines: []orders.Line{
			{SKU: "A", Quantity: quantity, UnitPrice: domain.Money{Amount: 100, Currency: "GBP"}},
			{SKU: "B", Quantity: 1, UnitPrice: domain.Money{Amount: 50, Currency: "GBP"}},
			{SKU: "A", Quantity: 1, UnitPrice: domain.Money{Amount: 99, Currency: "GBP"}},
		}}))
		return id
	}
	must(s.client.Receive(ctx, "", "A", 100))
	must(s.client.Receive(ctx, "", "B", 100))
	must(s.client.Adjust(ctx, "", "B", -3, "broken"))
	s.confirmed, s.shipped, s.delivered, s.refunded, s.called = place(1), place(2), place(3), place(4), place(5)
	s.rejected = place(1000)
	s.cancelled = place(6)
	must(s.client.Cancel(ctx, "", s.cancelled, "no"))
	settle()
	decline = true
	s.declined = place(7)
	settle()
	must(s.client.Cancel(ctx, "", s.called, "no"))
	for _, id := range []string{s.shipped, s.delivered, s.refunded} {
		must(s.client.Dispatch(ctx, "", id, "x", "y"))
	}
	must(s.client.Deliver(ctx, "", s.delivered))
	must(s.client.Deliver(ctx, "", s.refunded))
	settle()
	must(s.client.Refund(ctx, "", s.refunded, domain.Money{Amount: 10, Currency: "GBP"}))
	settle()
	return s
}

// tell changes what the API says: edit is called with each object that a GET of the path gives.
func (s *town) tell(path string, edit func(object)) {
	before := s.Tamper
	s.Tamper = func(at string, v any) any {
		if before != nil {
			v = before(at, v)
		}
		if at != path {
			return v
		}
		data, _ := json.Marshal(v)
		var o object
		_ = json.Unmarshal(data, &o)
		if items, list := o["items"].([]any); list && path != "/projections" {
			for _, item := range items {
				edit(item.(object))
			}
		} else {
			edit(o)
		}
		return o
	}
}

func (s *town) audit(t *testing.T) []Violation {
	t.Helper()
	violations, summary, err := Run(t.Context(), Options{URL: s.url, Wait: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	summary.Seconds = 0
	if diff := cmp.Diff(Summary{Orders: 8, Payments: 6, Shipments: 5, SKUs: 2}, summary); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	return violations
}

func TestSoundShop(t *testing.T) {
	s := newTown(t)
	states := map[orders.Status]int{}
	for o, err := range s.client.Orders(t.Context(), "", "") {
		if err != nil {
			t.Fatal(err)
		}
		states[o.Status]++
	}
	want := map[orders.Status]int{"confirmed": 1, "shipped": 1, "delivered": 2, "rejected": 2, "cancelled": 2}
	if diff := cmp.Diff(want, states); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	for _, v := range s.audit(t) {
		t.Error(v)
	}
}

// TestBrokenPromises breaks each invariant in what the API says, and expects exactly that to be found.
func TestBrokenPromises(t *testing.T) {
	t.Parallel()
	s := newTown(t)
	set := func(pairs ...any) func(object) {
		return func(o object) {
			for i := 0; i < len(pairs); i += 2 {
				o[pairs[i].(string)] = pairs[i+1]
			}
		}
	}
	where := func(key, value string, edit func(object)) func(object) {
		return func(o object) {
			if o[key] == value {
				edit(o)
			}
		}
	}
	gbp := func(n int64) object { return object{"amount": n, "currency": "GBP"} }
	movement := func(kind string, edit func(object)) func(object) {
		return func(o object) {
			for _, m := range o["movements"].([]any) {
				where("type", kind, edit)(m.(object))
			}
		}
	}
	longAgo := object{"deadline": "2020-01-02T03:04:05Z"}
	order := func(id string) string { return "/orders/" + id }
	payment := func(id string) string { return "/payments/" + id }
	for name, broken := range map[string]struct {
		path string
		edit func(object)
		want string // invariant and entity of each violation, sorted
	}{
		"units lost": {
			"/stock", where("sku", "A", set("received", 99)),
			"stock-balance /stock/A",
		},
		"units made": {
			"/stock", where("sku", "B", set("adjusted", 0)),
			"stock-balance /stock/B",
		},
		"oversold": {
			"/stock", where("sku", "A", set("received", 17, "available", -1)),
			"stock-balance /stock/A, stock-negative /stock/A",
		},
		"lost reservation": {
			"/stock", where("sku", "A", set("reserved", 0)),
			"stock-balance /stock/A, stock-reserved /stock/A",
		},
		"stale reservation": {
			"/stock", where("sku", "B", func(o object) { o["reserved"] = 2; o["available"] = o["available"].(float64) - 1 }),
			"stock-reserved /stock/B",
		},
		"shipped twice": {
			"/stock", where("sku", "B", func(o object) { o["shipped"] = 4; o["available"] = o["available"].(float64) - 1 }),
			"stock-shipped /stock/B",
		},
		"ledger": {
			"/ledger", where("account", "revenue", set("balance", gbp(0))),
			"ledger-balance /ledger, ledger-sum /ledger",
		},
		"ledger account": {
			"/ledger", where("account", "revenue", set("account", "bribes")),
			"ledger-balance /ledger, ledger-balance /ledger",
		},
		"sales": {
			"/sales", set("revenue", gbp(1)),
			"sales /sales",
		},
		"sold units":  {"/sales", set("units", 7), "sales /sales"},
		"sold orders": {"/sales", set("orders", 7), "sales /sales"},
		"total": {
			order(s.cancelled), set("total", gbp(1)),
			"order-total " + order(s.cancelled),
		},
		"no lines": {
			order(s.cancelled), set("lines", nil, "total", nil),
			"order-total " + order(s.cancelled),
		},
		"other payment": {
			order(s.shipped), set("payment", object{"status": "authorized", "version": 2}),
			"order-payment " + order(s.shipped),
		},
		"other shipment": {
			order(s.shipped), set("shipment", nil),
			"order-shipment " + order(s.shipped),
		},
		"no shipment": {
			"/shipments", where("order", s.confirmed, set("order", "x")),
			"order-shipment " + order(s.confirmed) + ", order-shipment " + order(s.confirmed) +
				", order-shipment /shipments/x",
		},
		"unpaid": {
			payment(s.delivered), set("authorized", gbp(300)),
			"paid " + order(s.delivered) + ", payment-amounts " + payment(s.delivered) + ", payment-capture " +
				payment(s.delivered),
		},
		"declined": {
			payment(s.confirmed), set("status", "declined"),
			"order-payment " + order(s.confirmed) + ", paid " + order(s.confirmed),
		},
		"not captured": {
			payment(s.shipped), set("status", "authorized"),
			"order-payment " + order(s.shipped) + ", paid " + order(s.shipped),
		},
		"still capturing": {
			payment(s.shipped), set("status", "capturing"),
			"at-rest " + payment(s.shipped) + ", order-payment " + order(s.shipped),
		},
		"still held": {
			payment(s.called), set("status", "authorized"),
			"no-charge " + order(s.called) + ", order-payment " + order(s.called),
		},
		"charged": {
			payment(s.called), set("captured", gbp(1)),
			"no-charge " + order(s.called) + ", payment-capture " + payment(s.called) + ", sales /sales",
		},
		"refunded too much": {
			payment(s.refunded), set("refunded", gbp(10_000)),
			"payment-amounts " + payment(s.refunded) + ", payment-capture " + payment(s.refunded) +
				", sales /sales",
		},
		"refund left open": {
			payment(s.refunded), set("pending", gbp(1)),
			"at-rest " + payment(s.refunded),
		},
		"captured twice": {
			payment(s.shipped), movement("payment.captured.v1", func(o object) { o["postings"] = nil }),
			"ledger-balance /ledger, ledger-balance /ledger, ledger-balance /ledger, ledger-balance /ledger",
		},
		"capture repeated": {
			payment(s.delivered), func(o object) { m := o["movements"].([]any); o["movements"] = append(m, m[len(m)-1]) },
			"ledger-balance /ledger, ledger-balance /ledger, ledger-balance /ledger, " +
				"ledger-balance /ledger, payment-capture " + payment(s.delivered) + ", payment-capture " + payment(s.delivered),
		},
		"lopsided posting": {payment(s.declined), func(o object) {
			o["movements"] = []any{object{"type": "x", "postings": []any{object{"account": "revenue", "amount": gbp(5)}}}}
		}, "ledger-balance /ledger, posting-balance " + payment(s.declined)},
		"payment lost": {
			payment(s.delivered), set("status", "", "version", 0, "authorized", nil, "captured", nil, "movements", nil),
			"ledger-balance /ledger, ledger-balance /ledger, order-payment " + order(s.delivered) + ", paid " +
				order(s.delivered) + ", sales /sales",
		},
		"rejected yet paid": {
			order(s.confirmed), set("status", "rejected"),
			"no-charge " + order(s.confirmed) + ", order-shipment " + order(s.confirmed) +
				", stock-reserved /stock/A, stock-reserved /stock/B",
		},
		"delivered, not yet": {
			order(s.shipped), set("status", "delivered"),
			"order-shipment " + order(s.shipped),
		},
		"confirmed late": {
			order(s.confirmed) + "/history", where("type", "order.placed.v1", set("data", longAgo)),
			"order-deadline " + order(s.confirmed),
		},
		"ended late": {
			order(s.cancelled) + "/history", where("type", "order.placed.v1", set("data", longAgo)),
			"order-deadline " + order(s.cancelled),
		},
		"no beginning": {
			order(s.shipped) + "/history", where("type", "order.placed.v1", set("type", "order.unplaced.v1")),
			"order-deadline " + order(s.shipped),
		},
	} {
		s.Tamper = nil
		s.tell(broken.path, broken.edit)
		var got []string
		for _, v := range s.audit(t) {
			got = append(got, v.Invariant+" "+v.Entity)
		}
		slices.Sort(got)
		if diff := cmp.Diff(broken.want, strings.Join(got, ", ")); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

// TestStuckOrder has an order that waits for ever: it is named, and nothing else.
func TestStuckOrder(t *testing.T) {
	s := newTown(t)
	stuck, err := s.client.Place(t.Context(), "", shop.NewOrder{Customer: "c", Lines: []orders.Line{
		{SKU: "A", Quantity: 1, UnitPrice: domain.Money{Amount: 1, Currency: "GBP"}}}})
	if err != nil {
		t.Fatal(err)
	}
	s.Step = -1 // no policy moves any more
	s.tell("/projections", func(o object) { o["policies"] = []any{} })
	violations, _, err := Run(t.Context(), Options{URL: s.url, Wait: time.Millisecond})
	if err != nil || len(violations) != 1 || !strings.HasPrefix(violations[0].String(), "at-rest /orders/"+stuck.ID+":") {
		t.Errorf("%v, %v", violations, err)
	}
}

func TestNotAtRest(t *testing.T) {
	t.Parallel()
	s := newTown(t)
	for name, edit := range map[string]func(object){
		"a policy lags":      func(o object) { o["policies"] = []any{object{"service": "shipping", "lag": 3}} },
		"a read model lags":  func(o object) { o["items"] = []any{object{"name": "ledger", "state": "live", "lag": 3}} },
		"an intent is open":  func(o object) { o["open_intents"] = 1 },
		"one has halted":     func(o object) { o["items"] = []any{object{"name": "ledger", "state": "halted"}} },
		"nothing to be read": func(o object) { o["items"] = []any{} },
	} {
		s.Tamper = nil
		s.tell("/projections", edit)
		if _, _, err := Run(t.Context(), Options{URL: s.url, Wait: time.Millisecond}); !errors.Is(err, ErrNotAtRest) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestMovingShop goes on while it is read for the first time, so that is read again.
func TestMovingShop(t *testing.T) {
	s := newTown(t)
	position := 0
	s.Tamper = func(path string, v any) any {
		if path == "/ledger" && position == 0 {
			position = 1
			return object{"items": []any{}} // what is read together is not of one moment
		}
		if path == "/projections" {
			return object{"items": []any{object{"name": "x", "state": "live", "position": fmt.Sprint("p", position)}}}
		}
		return v
	}
	violations, _, err := Run(t.Context(), Options{URL: s.url})
	if err != nil || len(violations) != 0 {
		t.Errorf("%v, %v", violations, err)
	}
}

func TestUnreachable(t *testing.T) {
	if _, _, err := Run(t.Context(), Options{URL: "http://127.0.0.1:1", Wait: time.Millisecond}); err == nil {
		t.Error("it audited nothing")
	}
	s := newTown(t)
	s.tell("/orders/"+s.rejected, func(o object) { o["version"] = "seven" })
	if _, _, err := Run(t.Context(), Options{URL: s.url}); err == nil || !strings.Contains(err.Error(), "promises") {
		t.Errorf("an answer of another shape: %v", err)
	}
}
