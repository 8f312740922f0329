package web_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/jackc/pgx/v5/pgconn"

	"wharf/commands"
	inventoryapi "wharf/commands/inventory"
	ordersapi "wharf/commands/orders"
	paymentsapi "wharf/commands/payments"
	shippingapi "wharf/commands/shipping"
	"wharf/domain"
	"wharf/domain/inventory"
	"wharf/domain/orders"
	"wharf/domain/payments"
	"wharf/domain/shipping"
	"wharf/infra/journal"
	"wharf/infra/web"
	"wharf/projections"
)

// newJournal is a journal in memory that runs until the test ends.
func newJournal[S commands.State[S]](t *testing.T, service string, events domain.Events) *journal.Journal[S] {
	const partitions = 2
	j := journal.New[S](journal.Config{Service: service, Topic: service + ".events", Partitions: partitions,
		Events: events, Log: journal.NewMemory(partitions), Public: journal.NewMemory(partitions)})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = j.Run(ctx) })
	t.Cleanup(func() { cancel(); wg.Wait() })
	return j
}

func newServer(t *testing.T) *httptest.Server {
	mux := http.NewServeMux()
	api := web.NewAPI(mux)
	register := func(api huma.API) {
		ordersapi.Register(api, ordersapi.Service{Journal: newJournal[orders.Order](t, "orders", orders.Events),
			Deadline: time.Minute, Now: time.Now})
		inventoryapi.Register(api, inventoryapi.Service{Journal: newJournal[inventory.Stock](t, "inventory", inventory.Events)})
		shippingapi.Register(api, shippingapi.Service{Journal: newJournal[shipping.Shipment](t, "shipping", shipping.Events)})
		paymentsapi.Register(api, paymentsapi.Service{Journal: newJournal[payments.Payment](t, "payments", payments.Events)})
	}
	register(api)
	document, err := web.Document(register)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewServer(web.Handler(mux, document, "test", func() error { return nil }))
	t.Cleanup(s.Close)
	return s
}

const goodLine = `{"sku":"85123A","quantity":6,"unit_price":{"amount":255,"currency":"GBP"}}`

func order(lines ...string) string {
	return `{"customer":"17850","lines":[` + strings.Join(lines, ",") + `]}`
}

func TestBadInputGetsAProblemThatNamesTheField(t *testing.T) {
	s := newServer(t)
	id := "0b2f8c1e-7a55-4b52-9c2c-3c1f7c9b8a10"
	var manyFields string
	for i := range 20_000 {
		manyFields += fmt.Sprintf(`"k%d":1,`, i)
	}
	manyFields = "{" + manyFields + `"z":1}`
	many := make([]string, 2001)
	for i := range many {
		many[i] = goodLine
	}
	line := func(old, new string) string { return order(strings.Replace(goodLine, old, new, 1)) }
	for name, c := range map[string]struct {
		path, body string
		status     int
		field      string // that the problem names
	}{
		"no JSON":             {"/orders", `{"customer":`, 400, ""},
		"not UTF-8":           {"/orders", "{\"customer\":\"\xff\"}", 400, ""},
		"no body":             {"/orders", "", 400, ""},
		"null":                {"/orders", "null", 422, "body"},
		"an array":            {"/orders", "[]", 422, "body"},
		"too large":           {"/orders", `{"customer":"` + strings.Repeat("x", web.MaxBody) + `"}`, 413, ""},
		"unknown field":       {"/orders", `{"customer":"c","lines":[` + goodLine + `],"secret":"hunter2"}`, 422, "body.secret"},
		"other letter case":   {"/orders", `{"Customer":"c","lines":[` + goodLine + `]}`, 422, "body"},
		"no customer":         {"/orders", `{"lines":[` + goodLine + `]}`, 422, "body"},
		"empty customer":      {"/orders", `{"customer":"","lines":[` + goodLine + `]}`, 422, "body.customer"},
		"long customer":       {"/orders", `{"customer":"` + strings.Repeat("x", 201) + `","lines":[` + goodLine + `]}`, 422, "body.customer"},
		"control characters":  {"/orders", `{"customer":"a\u0000b","lines":[` + goodLine + `]}`, 422, "body.customer"},
		"trailing newline":    {"/orders", `{"customer":"a\n","lines":[` + goodLine + `]}`, 422, "body.customer"},
		"null lines":          {"/orders", `{"customer":"c","lines":null}`, 422, "body.lines"},
		"no lines":            {"/orders", order(), 422, "body.lines"},
		"2001 lines":          {"/orders", order(many...), 422, "body.lines"},
		"quantity 0":          {"/orders", line(`:6`, `:0`), 422, "body.lines[0].quantity"},
		"quantity -1":         {"/orders", line(`:6`, `:-1`), 422, "body.lines[0].quantity"},
		"quantity 1000001":    {"/orders", line(`:6`, `:1000001`), 422, "body.lines[0].quantity"},
		"quantity 1.5":        {"/orders", line(`:6`, `:1.5`), 422, "body.lines[0].quantity"},
		"quantity text":       {"/orders", line(`:6`, `:"hunter2"`), 422, "body.lines[0].quantity"},
		"price negative":      {"/orders", line(`:255`, `:-1`), 422, "body.lines[0].unit_price.amount"},
		"price 0":             {"/orders", line(`:255`, `:0`), 422, "body.lines[0].unit_price.amount"},
		"price 2.55":          {"/orders", line(`:255`, `:2.55`), 422, "body.lines[0].unit_price.amount"},
		"price 2.0":           {"/orders", line(`:255`, `:2.0`), 422, "body lines.unit_price.amount"},
		"price beyond int64":  {"/orders", line(`:255`, `:9223372036854775808`), 422, "body.lines[0].unit_price.amount"},
		"price beyond float":  {"/orders", line(`:255`, `:1e999`), 400, ""},
		"sum too large":       {"/orders", order(strings.NewReplacer(`:255`, `:9007199254740991`, ":6", ":1000000").Replace(goodLine)), 422, "body.lines[0].unit_price.amount"},
		"mixed currencies":    {"/orders", order(goodLine, strings.Replace(goodLine, "GBP", "EUR", 1)), 422, "body.lines[1].unit_price.currency"},
		"no currency":         {"/orders", line(`"GBP"`, `""`), 422, "body.lines[0].unit_price.currency"},
		"empty SKU":           {"/orders", line("85123A", ""), 422, "body.lines[0].sku"},
		"long SKU":            {"/orders", line("85123A", strings.Repeat("s", 65)), 422, "body.lines[0].sku"},
		"SKU with a tab":      {"/orders", line("85123A", `a\tb`), 422, "body.lines[0].sku"},
		"id is no UUID":       {"/orders/17/cancel", `{"reason":"r"}`, 422, "path.id"},
		"unknown order":       {"/orders/" + id + "/cancel", `{"reason":"r"}`, 404, ""},
		"no reason":           {"/orders/" + id + "/cancel", `{}`, 422, "body"},
		"SKU path too long":   {"/stock/" + strings.Repeat("s", 65) + "/receive", `{"quantity":1}`, 422, "path.sku"},
		"SKU path control":    {"/stock/a%00b/receive", `{"quantity":1}`, 422, "path.sku"},
		"SKU path not UTF-8":  {"/stock/a%ffb/receive", `{"quantity":1}`, 422, "path.sku"},
		"receive 0":           {"/stock/a/receive", `{"quantity":0}`, 422, "body.quantity"},
		"adjust 0":            {"/stock/a/adjust", `{"delta":0,"reason":"r"}`, 422, "body.delta"},
		"adjust unknown":      {"/stock/nothing/adjust", `{"delta":1,"reason":"r"}`, 404, ""},
		"dispatch unknown":    {"/shipments/" + id + "/dispatch", `{"carrier":"c","tracking":"t"}`, 404, ""},
		"dispatch no UUID":    {"/shipments/17/dispatch", `{"carrier":"c","tracking":"t"}`, 422, "path.order"},
		"deliver unknown":     {"/shipments/" + id + "/deliver", ``, 404, ""},
		"refund unknown":      {"/payments/" + id + "/refund", `{"amount":{"amount":1,"currency":"GBP"}}`, 404, ""},
		"refund 0":            {"/payments/" + id + "/refund", `{"amount":{"amount":0,"currency":"GBP"}}`, 422, "body.amount.amount"},
		"many unknown fields": {"/orders", manyFields, 422, "body.k"},
		"a field's long name": {"/orders", `{"` + strings.Repeat("x", 1<<20) + `":1}`, 422, "body.xxx"},
		"a UUID with more":    {"/orders/hunter20b2f8c1e-7a55-4b52-9c2c-3c1f7c9b8a10/cancel", `{"reason":"r"}`, 422, "path.id"},
		"a broken query":      {"/orders?customer=%zz", order(goodLine), 400, ""},
		"an empty query":      {"/orders?limit=", order(goodLine), 422, "query.limit"},
		"a path to clean":     {"//orders", order(goodLine), 404, ""},
		"unknown path":        {"/nothing", `{}`, 404, ""},
		"unknown query field": {"/orders?hunter2=1", order(goodLine), 422, "query.hunter2"},
	} {
		t.Run(name, func(t *testing.T) {
			status, body := post(t, s.URL+c.path, c.body)
			var p web.Problem
			if err := json.Unmarshal([]byte(body), &p); err != nil || status != c.status || p.Status != c.status ||
				!strings.HasPrefix(p.Type, "urn:wharf:problem:") || p.Title == "" {
				t.Fatalf("status %d, want %d: %s", status, c.status, body)
			}
			if !strings.Contains(fmt.Sprint(p.Errors), "{"+c.field) && (c.field != "" || len(p.Errors) > 1) {
				t.Errorf("%q is not named: %s", c.field, body)
			}
			if len(body) > 5000 {
				t.Errorf("the problem has %d bytes", len(body))
			}
			for _, echoed := range []string{"hunter2", "9223372036854775808", "1e999"} {
				if strings.Contains(strings.ReplaceAll(body, "query.hunter2", ""), echoed) {
					t.Errorf("input is echoed: %s", body)
				}
			}
		})
	}
}

func post(t *testing.T, url, body string, headers ...string) (int, string) {
	t.Helper()
	r, _ := http.NewRequest(http.MethodPost, url, strings.NewReader(body))
	r.Header.Set("Content-Type", "application/json")
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	res, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, _ := io.ReadAll(res.Body)
	if ct := res.Header.Get("Content-Type"); res.StatusCode >= 400 && ct != "application/problem+json" {
		t.Errorf("a problem comes as %q", ct)
	}
	return res.StatusCode, string(b)
}

func TestHeadersOfCommands(t *testing.T) {
	s := newServer(t)
	status, first := post(t, s.URL+"/orders", order(goodLine), "Idempotency-Key", "k1")
	if status != 201 {
		t.Fatal(status, first)
	}
	if status, again := post(t, s.URL+"/orders", order(goodLine), "Idempotency-Key", "k1"); status != 201 || again != first {
		t.Fatal(status, again)
	}
	if status, body := post(t, s.URL+"/orders", order(goodLine, goodLine), "Idempotency-Key", "k1"); status != 422 {
		t.Fatal(status, body)
	}
	for _, bad := range []string{"", "a b", strings.Repeat("k", 256), "ü"} {
		if status, body := post(t, s.URL+"/orders", order(goodLine), "Idempotency-Key", bad); status != 422 ||
			!strings.Contains(body, "header.Idempotency-Key") {
			t.Fatal(status, body)
		}
	}
	var accepted commands.AcceptedBody
	_ = json.Unmarshal([]byte(first), &accepted)
	cancel := s.URL + "/orders/" + accepted.ID + "/cancel"
	for match, want := range map[string]int{`"7"`: 412, `"x"`: 422, `1`: 422, `W/"1"`: 422, `"+1"`: 422, `"01"`: 422,
		`"1."`: 422, `"1", "2"`: 422, ``: 422} {
		if status, body := post(t, cancel, `{"reason":"r"}`, "If-Match", match); status != want {
			t.Fatal(match, status, body)
		}
	}
	upper := s.URL + "/orders/" + strings.ToUpper(accepted.ID) + "/cancel"
	if status, body := post(t, upper, `{"reason":"r"}`, "If-Match", `"1.abcdef"`); status != 200 {
		t.Fatal(status, body)
	}
	if status, body := post(t, cancel, `{"reason":"r"}`); status != 200 || !strings.Contains(body, `"version":2`) {
		t.Fatal("cancelling again", status, body)
	}
	if status, body := post(t, cancel, `{"reason":"other"}`); status != 409 {
		t.Fatal("cancelling otherwise", status, body)
	}
	for _, c := range []struct {
		match string
		want  int
	}{{`*`, 412}, {`"3"`, 412}, {`"0"`, 200}, {`"0"`, 412}, {`*`, 200}} {
		if status, body := post(t, s.URL+"/stock/new/receive", `{"quantity":1}`, "If-Match", c.match); status != c.want {
			t.Fatal("If-Match on a new SKU", c.match, status, body)
		}
	}
	if status, body := post(t, s.URL+"/orders", order(goodLine), "Content-Type", "hunter2/plain"); status != 415 || strings.Contains(body, "hunter2") {
		t.Fatal("another media type", status, body)
	}
	if res, err := http.Get(s.URL + "/orders/x/cancel"); err != nil || res.StatusCode != 405 || res.Header.Get("Allow") != "POST" {
		t.Fatal(res, err)
	}
}

// An answer that says "not now" says why, and when to come back, whoever makes it.
func TestNotReadySaysWhenToComeBack(t *testing.T) {
	mux := http.NewServeMux()
	api := web.NewAPI(mux)
	for path, err := range map[string]error{
		"/behind": &projections.BehindError{Model: "orders", Wanted: domain.Position{Topic: "orders.events", Seq: 3}, Seen: 2},
		"/away":   &pgconn.PgError{Code: "57P01", Message: "terminating connection due to administrator command"},
		"/slow":   context.DeadlineExceeded,
		"/gone":   &pgconn.PgError{Code: "42P01", Message: "relation does not exist"},
	} {
		huma.Get(api, path, func(context.Context, *struct{}) (*struct{}, error) { return nil, fmt.Errorf("read: %w", err) })
	}
	s := httptest.NewServer(web.Handler(mux, nil, "test", func() error { return errors.New("not yet") }))
	t.Cleanup(s.Close)
	for path, want := range map[string]string{
		"/readyz": "not yet", "/behind": "has seen 2 events of orders.events partition 0, and not yet event 3",
		"/away": "a server that this one needs", "/slow": "it took too long", "/gone": "the read model is not there",
	} {
		res, err := http.Get(s.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(res.Body)
		_ = res.Body.Close()
		if res.StatusCode != 503 || res.Header.Get("Retry-After") == "" || !strings.Contains(string(body), want) {
			t.Errorf("%s: %d %v %s", path, res.StatusCode, res.Header, body)
		}
	}
}

// An answer whose tag the client has is not sent again, and one that says something else has another tag. Headers that are
// lists may come in several lines.
func TestAnAnswerThatTheClientHasIsNotSentAgain(t *testing.T) {
	type prefer struct {
		Prefer string `header:"Prefer"`
	}
	text := "one"
	mux := http.NewServeMux()
	huma.Get(web.NewAPI(mux), "/text", func(_ context.Context, in *prefer) (*projections.One[string], error) {
		return &projections.One[string]{ETag: `"7"`, Body: text + in.Prefer}, nil
	})
	s := httptest.NewServer(web.Handler(mux, nil, "test", func() error { return nil }))
	t.Cleanup(s.Close)
	get := func(method string, header http.Header) (status int, tag, body string) {
		r, err := http.NewRequestWithContext(t.Context(), method, s.URL+"/text", nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header = header
		res, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		data, _ := io.ReadAll(res.Body)
		return res.StatusCode, res.Header.Get("ETag"), string(data)
	}
	status, tag, body := get(http.MethodGet, http.Header{})
	if status != 200 || !strings.HasPrefix(tag, `"7.`) || body != "\"one\"\n" {
		t.Fatalf("at first: %d %s %s", status, tag, body)
	}
	for _, header := range []http.Header{
		{"If-None-Match": {tag}}, {"If-None-Match": {"*"}}, {"If-None-Match": {`"a", W/` + tag}}, {"If-None-Match": {`"a"`, tag}},
	} {
		for _, method := range []string{http.MethodGet, http.MethodHead} {
			if status, same, body := get(method, header); status != 304 || same != tag || body != "" {
				t.Errorf("%s %v: %d %s %s", method, header, status, same, body)
			}
		}
	}
	if status, _, _ := get(http.MethodGet, http.Header{"If-None-Match": {`"7"`}}); status != 200 {
		t.Errorf("another tag: %d", status)
	}
	if _, _, body := get(http.MethodGet, http.Header{"Prefer": {"a", "wait=1"}}); !strings.Contains(body, "a, wait=1") {
		t.Errorf("two lines are read as %s", body)
	}
	text = "two"
	if status, other, body := get(http.MethodGet, http.Header{"If-None-Match": {tag}}); status != 200 || other == tag || !strings.Contains(body, "two") {
		t.Errorf("changed: %d %s %s", status, other, body)
	}
}
