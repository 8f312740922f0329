package postgres

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"
	"github.com/google/uuid"

	"wharf/domain"
	"wharf/domain/inventory"
	"wharf/domain/orders"
	"wharf/domain/payments"
	"wharf/domain/shipping"
	"wharf/infra/journal"
	"wharf/projections"
)

// api is the query service over a shop of a few odd orders.
type api struct {
	t       *testing.T
	handler http.Handler
}

func newAPI(t *testing.T, s *shop) api {
	pool := openTest(t)
	start(t, newEngine(t, pool, s))
	s.caughtUp(t, pool)
	query, err := OpenQuery(context.Background(), pool.Config().ConnString())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(query.Close)
	if err := projections.Ready(context.Background(), query); err != nil {
		t.Error(err)
	}
	mux := http.NewServeMux()
	config := huma.DefaultConfig("test", "1")
	config.CreateHooks = nil
	projections.Register(humago.New(mux, config), projections.Reads{DB: query, Positions: NewPositions(query), Lags: testLags{s}})
	return api{t, mux}
}

func (a api) get(path string) *httptest.ResponseRecorder {
	a.t.Helper()
	w := httptest.NewRecorder()
	a.handler.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
	return w
}

// body is the answer to the path, which must be a 200.
func (a api) body(path string) string {
	a.t.Helper()
	w := a.get(path)
	if w.Code != http.StatusOK {
		a.t.Errorf("GET %s: %d %s", path, w.Code, w.Body)
	}
	return strings.TrimSpace(w.Body.String())
}

func (a api) expect(path, want string) {
	a.t.Helper()
	if got := a.body(path); got != want {
		a.t.Errorf("GET %s:\n got %s\nwant %s", path, got, want)
	}
}

// walk follows the pages of a list, and counts them.
func (a api) walk(path, field string) (values []string, pages int) {
	a.t.Helper()
	for path != "" {
		w := a.get(path)
		var list struct{ Items []map[string]any }
		if err := json.Unmarshal(w.Body.Bytes(), &list); err != nil || w.Code != http.StatusOK {
			a.t.Fatalf("GET %s: %d %s", path, w.Code, w.Body)
		}
		if list.Items == nil {
			a.t.Errorf("GET %s: items is null", path)
		}
		if tag := w.Header().Get("ETag"); tag != `"0"` {
			a.t.Errorf("GET %s: the ETag is %s", path, tag)
		}
		for _, item := range list.Items {
			values = append(values, fmt.Sprint(item[field]))
		}
		pages++
		next, more := strings.CutSuffix(w.Header().Get("Link"), `>; rel="next"`)
		if path = strings.TrimPrefix(next, "<"); more && len(list.Items) == 0 {
			a.t.Errorf("an empty page says that there is more")
		}
	}
	return values, pages
}

func TestTheAnswersOfOneOrder(t *testing.T) {
	s := newShop()
	id := uuid.MustParse(orderID(1))
	line := orders.Line{SKU: "MUG", Quantity: 2, UnitPrice: pounds(150)}
	s.tell(id.String(), orders.Placed{Customer: "C <&> é", Lines: []orders.Line{line, line},
		Items: orders.Items([]orders.Line{line, line}), Total: pounds(600)})
	s.tell("MUG", inventory.ReservationRejected{Order: id, Quantity: 4})
	s.tell(id.String(), orders.Rejected{Reason: "not enough stock of MUG", Items: orders.Items([]orders.Line{line})})
	a := newAPI(t, s)

	path := "/orders/" + id.String()
	a.expect(path, `{"id":"`+id.String()+`","customer":"C <&> é","status":"rejected","reason":"not enough stock of MUG",`+
		`"total":{"amount":600,"currency":"GBP"},"payment":{"status":"","version":0},"shipment":{"status":"","version":0},"version":2,"placed_at":"2026-03-31T23:59:00.124456Z","updated_at":"2026-03-31T23:59:00.126456Z",`+
		`"lines":[{"sku":"MUG","quantity":2,"unit_price":{"amount":150,"currency":"GBP"}},{"sku":"MUG","quantity":2,"unit_price":{"amount":150,"currency":"GBP"}}]}`)
	if tag := a.get(path).Header().Get("ETag"); tag != `"2"` {
		t.Errorf("the ETag is %s", tag)
	}
	a.expect("/orders/"+strings.ToUpper(id.String()), a.body(path))
	a.expect("/stock/MUG", `{"sku":"MUG","received":0,"adjusted":0,"available":0,"reserved":0,"shipped":0,"version":1}`)
	history := a.body(path + "/history")
	for _, want := range []string{`"type":"order.placed.v1","service":"orders","time":"2026-03-31T23:59:00.124456Z","version":1,"position":"orders.events/`,
		`"type":"stock.reservation_rejected.v1","service":"inventory"`, `"data":{"order":"` + id.String() + `","quantity":4,"available":0}`} {
		if !strings.Contains(history, want) {
			t.Errorf("the history lacks %s: %s", want, history)
		}
	}
	if strings.Count(history, `"cause":""`) != 3 {
		t.Errorf("the history has a cause: %s", history)
	}
}

func TestTheAnswersOfAPaymentAndItsParts(t *testing.T) {
	s := newShop()
	id := orderID(1)
	refund := uuid.NewSHA1(uuid.Nil, []byte("refund"))
	s.order(1, 1) // 1 unit, 2.50, on March 31
	s.tell(id, payments.RefundRequested{Refund: refund, Amount: pounds(100)})
	s.tell(id, payments.RefundRequested{Refund: uuid.Nil, Amount: pounds(30)})
	// A day later.
	s.Clock = s.Clock.AddDate(0, 0, 1)
	s.tell(id, payments.Refunded{Refund: refund, Amount: pounds(100), Postings: []payments.Posting{
		{Account: payments.AccountRevenue, Amount: pounds(100)}, {Account: payments.AccountReceivable, Amount: pounds(-100)}}})
	dollar := domain.Money{Amount: 7, Currency: "USD"}
	s.tell(orderID(2), payments.AuthorizationRequested{Amount: dollar}, payments.Authorized{Amount: dollar, Postings: []payments.Posting{
		{Account: payments.AccountAuthorized, Amount: dollar}, {Account: payments.AccountAuthorizedFor, Amount: domain.Money{Amount: -7, Currency: "USD"}}}})
	s.tell(orderID(3), payments.AuthorizationRequested{Amount: dollar}, payments.Declined{Reason: "no money"})
	a := newAPI(t, s)

	payment := a.body("/payments/" + id)
	for _, want := range []string{
		`"status":"captured","authorized":{"amount":250,"currency":"GBP"},"captured":{"amount":250,"currency":"GBP"},` +
			`"refunded":{"amount":100,"currency":"GBP"},"pending":{"amount":30,"currency":"GBP"},"version":7,"movements":[{"id":"`,
		`"type":"payment.capture_requested.v1"`, `"amount":{"amount":250,"currency":"GBP"},"postings":[]}`,
		`"postings":[{"account":"revenue","amount":{"amount":100,"currency":"GBP"}},`, `"refund":"` + refund.String() + `"`,
		`"reference":"ref"`,
	} {
		if !strings.Contains(payment, want) {
			t.Errorf("the payment lacks %s: %s", want, payment)
		}
	}
	if declined := a.body("/payments/" + orderID(3)); !strings.Contains(declined, `"postings":[],"reason":"no money"`) {
		t.Errorf("declined: %s", declined)
	}
	a.expect("/ledger", `{"items":[{"account":"authorized","balance":{"amount":250,"currency":"GBP"}},{"account":"authorized","balance":{"amount":7,"currency":"USD"}},`+
		`{"account":"authorized_for","balance":{"amount":-250,"currency":"GBP"}},{"account":"authorized_for","balance":{"amount":-7,"currency":"USD"}},`+
		`{"account":"receivable","balance":{"amount":150,"currency":"GBP"}},{"account":"revenue","balance":{"amount":-150,"currency":"GBP"}}]}`)
	sold := `{"date":"2026-03-31","revenue":{"amount":250,"currency":"GBP"},"orders":1,"units":1}`
	back := `{"date":"2026-04-01","revenue":{"amount":-100,"currency":"GBP"},"orders":0,"units":0}`
	a.expect("/sales", `{"items":[`+sold+`,`+back+`]}`)
	a.expect("/sales?from=2026-04-01", `{"items":[`+back+`]}`)
	a.expect("/sales?from=2026-03-31&to=2026-03-31", `{"items":[`+sold+`]}`)
	a.expect("/sales?to=2026-03-30", `{"items":[]}`)
	a.expect("/shipments/"+id, `{"order":"`+id+`","status":"delivered","carrier":"Post","tracking":"T1","version":3}`)
	if order := a.body("/orders/" + id); !strings.Contains(order, `"payment":{"status":"captured","version":7},"shipment":{"status":"delivered","version":3}`) {
		t.Errorf("the order is %s", order)
	}
	status := a.body("/projections")
	for _, want := range []string{`"policies":[{"service":"orders","lag":3}],"open_intents":1`,
		`"state":"live","position":{"inventory.events":2},"lag":0,`} {
		if !strings.Contains(status, want) {
			t.Errorf("the status lacks %s: %s", want, status)
		}
	}
}

func TestListsArePagedByKey(t *testing.T) {
	s := newShop()
	var ids, shipments []string
	for i := range 25 {
		s.order(i, 2)
		ids = append(ids, orderID(i))
	}
	s.tell(orderID(99), shipping.Created{}) // of an order that has not been heard of
	shipments = append(slices.Clone(ids), orderID(99))
	slices.Reverse(ids) // newest first
	slices.Sort(shipments)
	a := newAPI(t, s)

	got, pages := a.walk("/orders?limit=4", "id")
	if !slices.Equal(got, ids) || pages != 7 {
		t.Errorf("%d pages of orders %v, want 7 of %v", pages, got, ids)
	}
	if got, pages := a.walk("/orders?limit=25", "id"); !slices.Equal(got, ids) || pages != 1 {
		t.Errorf("%d pages of %d orders: there was no next one", pages, len(got))
	}
	if got, pages := a.walk("/orders?limit=1000", "id"); !slices.Equal(got, ids) || pages != 1 {
		t.Errorf("%d pages of %d orders", pages, len(got))
	}
	got, pages = a.walk("/orders?customer=customer+3&status=delivered&limit=1", "id")
	if want := []string{orderID(23), orderID(13), orderID(3)}; !slices.Equal(got, want) || pages != 3 {
		t.Errorf("%d pages of the orders of customer 3: %v, want %v", pages, got, want)
	}
	if got, _ := a.walk("/orders?status=placed", "id"); len(got) != 0 {
		t.Errorf("placed are %v", got)
	}
	if got, pages := a.walk("/shipments?limit=10", "order"); !slices.Equal(got, shipments) || pages != 3 {
		t.Errorf("%d pages of shipments %v, want 3 of %v", pages, got, shipments)
	}
	if got, _ := a.walk("/shipments?status=created", "order"); !slices.Equal(got, []string{orderID(99)}) {
		t.Errorf("created shipments are %v", got)
	}
	stock, pages := a.walk("/stock?limit=5", "sku")
	if len(stock) != 26 || !slices.IsSorted(stock) || pages != 6 {
		t.Errorf("%d pages of stock %v", pages, stock)
	}
	history, pages := a.walk("/orders/"+orderID(7)+"/history?limit=3", "type")
	if len(history) != 7+4+3+4 || pages != 6 || history[0] != "order.placed.v1" || history[len(history)-1] != "order.delivered.v1" {
		t.Errorf("%d pages of history %v", pages, history)
	}
	if w := a.get("/orders?limit=1"); strings.Contains(w.Body.String(), "lines") {
		t.Errorf("a list of orders has lines: %s", w.Body)
	}
	if got, pages := a.walk("/ledger?limit=1", "account"); len(got) != 4 || pages != 4 {
		t.Errorf("%d pages of the ledger: %v", pages, got)
	}
	if got, pages := a.walk("/sales?limit=1&from=2026-01-01", "date"); len(got) != 1 || pages != 1 {
		t.Errorf("%d pages of sales: %v", pages, got)
	}
}

func TestOddSKUsAreFound(t *testing.T) {
	s := newShop()
	skus := []string{"a b", "a.b", "a_b", "a%b", "a/b", "é€", "lower", "..", ".", "a+b", "a?b", "a#b", "%2F", "//", strings.Repeat("ü", 64)}
	for i, sku := range skus {
		s.tell(sku, inventory.Received{Quantity: int64(i + 1)})
	}
	a := newAPI(t, s)
	for i, sku := range skus {
		path := "/stock/" + strings.ReplaceAll(url.PathEscape(sku), ".", "%2E")
		var got projections.StockItem
		if err := json.Unmarshal([]byte(a.body(path)), &got); err != nil || got.SKU != sku || got.Received != int64(i+1) {
			t.Errorf("GET %s: %+v %v", path, got, err)
		}
	}
}

func TestBadQuestionsAreRefusedByName(t *testing.T) {
	s := newShop()
	s.order(1, 1)
	s.tell(orderID(5), shipping.Created{}) // its order has not been heard of
	a := newAPI(t, s)
	stockCursor := "eyJza3UiOiJTS1UtMCJ9" // {"sku":"SKU-0"}
	a.body("/stock?cursor=" + stockCursor)
	for path, field := range map[string]string{
		"/orders/4711":                         "path.id",
		"/orders/urn:uuid:" + orderID(1):       "path.id",
		"/orders/4711/history":                 "path.id",
		"/payments/x":                          "path.order",
		"/shipments/x":                         "path.order",
		"/orders?limit=0":                      "query.limit",
		"/orders?limit=-5":                     "query.limit",
		"/orders?limit=many":                   "query.limit",
		"/orders?cursor=%00":                   "query.cursor",
		"/orders?cursor=" + stockCursor:        "query.cursor",
		"/shipments?cursor=" + stockCursor:     "query.cursor",
		"/stock?cursor=bnVsbA":                 "query.cursor", // null
		"/stock?cursor=eyJza3UiOiJcdTAwMDAifQ": "query.cursor", // {"sku":"\u0000"}
		"/stock?cursor=" + stockCursor + "x":   "query.cursor",
		"/orders/" + orderID(1) + "/history?cursor=" + stockCursor: "query.cursor",
		"/orders?status=painted":                                   "query.status",
		"/shipments?status=placed":                                 "query.status",
		"/orders?customer=%00":                                     "query.customer",
		"/orders?customer=%ff":                                     "query.customer",
		"/orders?customer=" + strings.Repeat("x", 201):             "query.customer",
		"/stock/%00":                        "path.sku",
		"/stock/%ff":                        "path.sku",
		"/stock/" + strings.Repeat("x", 65): "path.sku",
		"/sales?from=yesterday":             "query.from",
		"/sales?to=2026-02-30":              "query.to",
	} {
		w := a.get(path)
		var problem struct{ Errors []struct{ Location string } }
		if err := json.Unmarshal(w.Body.Bytes(), &problem); err != nil || w.Code != http.StatusUnprocessableEntity ||
			len(problem.Errors) == 0 || problem.Errors[0].Location != field {
			t.Errorf("GET %s: %d %s, want a 422 that names %s", path, w.Code, w.Body, field)
		}
	}
	// A question that is no good need not wait for anything.
	r := httptest.NewRequest(http.MethodGet, "/orders?cursor=x", nil)
	r.Header.Set("Consistency-Token", "orders.events/0/1000000")
	w := httptest.NewRecorder()
	if a.handler.ServeHTTP(w, r); w.Code != http.StatusUnprocessableEntity {
		t.Errorf("a cursor that is none, with a token of what is yet to come: %d %s", w.Code, w.Body)
	}
	// The edge knows what to make of this error; here it is huma's 500.
	for _, path := range []string{"/orders/" + orderID(4), "/orders/" + orderID(5), "/orders/" + orderID(4) + "/history",
		"/payments/" + orderID(4), "/shipments/" + orderID(4), "/stock/nothing"} {
		if w := a.get(path); w.Code != http.StatusInternalServerError || !strings.Contains(w.Body.String(), domain.ErrUnknown.Error()) {
			t.Errorf("GET %s: %d %s, want domain.ErrUnknown", path, w.Code, w.Body)
		}
	}
}

// A sum says that it misses an event, although the event would have made a row of its own.
func TestASumThatMissesAnEventSaysSo(t *testing.T) {
	s := newShop()
	one, other := orderID(1), ""
	for i := 2; other == "" || journal.Partition([]byte(other), partitions) == journal.Partition([]byte(one), partitions); i++ {
		other = orderID(i)
	}
	s.tell(one, payments.Captured{Amount: pounds(100)})
	s.raw(projections.PaymentsTopic, other, "payment.captured.v1", `{"amount": broken`)
	if got := newAPI(t, s).body("/sales"); !strings.Contains(got, `"stale":true`) {
		t.Error(got)
	}
}
