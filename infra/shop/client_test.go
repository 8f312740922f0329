package shop_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
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

func client(t *testing.T, url string) *shop.Client {
	t.Helper()
	c, err := shop.New(url, 4)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

var order = shop.NewOrder{Customer: "c", Lines: []orders.Line{
	{SKU: "a/b c", Quantity: 2, UnitPrice: domain.Money{Amount: 150, Currency: "GBP"}},
}}

func TestEveryCall(t *testing.T) {
	s := shoptest.New()
	c := client(t, s.Start(t)+"/")
	ctx := t.Context()
	must := func(r shop.Receipt, err error) shop.Receipt {
		t.Helper()
		if err != nil || r.Version == 0 {
			t.Fatalf("%+v, %v", r, err)
		}
		return r
	}
	must(c.Receive(ctx, "", "a/b c", 5))
	must(c.Adjust(ctx, "", "a/b c", -1, "broken"))
	id := must(c.Place(ctx, "k", order)).ID
	if again := must(c.Place(ctx, "k", order)); again.ID != id {
		t.Errorf("the same key gave %s, then %s", id, again.ID)
	}
	for s.Events() < 10 { // each look lets the shop go on
		if _, err := c.Projections(ctx); err != nil {
			t.Fatal(err)
		}
	}
	must(c.Dispatch(ctx, "", id, "x", "y"))
	must(c.Deliver(ctx, "", id))
	if _, why, err := c.Resting(ctx); err != nil || why != "" {
		t.Errorf("not at rest: %s, %v", why, err)
	}
	must(c.Refund(ctx, "", id, domain.Money{Amount: 100, Currency: "GBP"}))
	if _, err := c.Cancel(ctx, "", id, "too late"); !shop.IsStatus(err, http.StatusConflict) {
		t.Errorf("cancel: %v", err)
	}
	if _, _, err := c.Resting(ctx); err != nil {
		t.Fatal(err)
	}

	o, err := c.Order(ctx, id)
	if err != nil || o.Status != orders.StatusDelivered || o.Total.Amount != 300 || o.Payment.Status != "captured" ||
		len(o.Lines) != 1 || o.PlacedAt.IsZero() {
		t.Errorf("%+v, %v", o, err)
	}
	stock, err := c.Stock(ctx, "a/b c")
	want := shop.Stock{SKU: "a/b c", Received: 5, Adjusted: -1, Available: 2, Shipped: 2, Version: stock.Version}
	if err != nil || stock != want {
		t.Errorf("%+v, %v", stock, err)
	}
	p, err := c.Payment(ctx, id)
	if err != nil || p.Captured.Amount != 300 || p.Refunded.Amount != 100 || len(p.Movements) != 6 {
		t.Errorf("%+v, %v", p, err)
	}
	if _, err := c.Payment(ctx, "nobody"); !shop.IsStatus(err, http.StatusNotFound) {
		t.Errorf("an unknown payment: %v", err)
	}
	events := 0
	for _, err := range c.History(ctx, id, 2) { // page by page
		if err != nil {
			t.Fatal(err)
		}
		events++
	}
	if events != int(s.Events())-2 { // all but receive and adjust
		t.Errorf("%d of %d events", events, s.Events())
	}
	for _, err := range c.Sales(ctx) {
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestTriesAgain(t *testing.T) {
	s := shoptest.New()
	s.Faulty = func(n int) (before, after int) {
		switch n {
		case 1:
			return 503, 0
		case 2:
			return 0, 504
		case 3:
			return 0, 1
		case 4:
			return 0, 409
		case 5:
			return 502, 0
		}
		return 0, 0
	}
	c := client(t, s.Start(t))
	if _, err := c.Receive(t.Context(), "", "a", 7); err != nil {
		t.Fatal(err)
	}
	if got, _ := c.Stock(t.Context(), "a"); got.Received != 7 {
		t.Errorf("7 units were received as %d", got.Received)
	}
	if s.Commands() != 6 {
		t.Errorf("%d tries", s.Commands())
	}
}

func TestGivesUp(t *testing.T) {
	status := http.StatusServiceUnavailable
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status) }))
	defer server.Close()
	c := client(t, server.URL)
	c.Patience = 20 * time.Millisecond
	if _, err := c.Receive(t.Context(), "", "a", 1); !shop.IsStatus(err, status) {
		t.Errorf("patience: %v", err)
	}
	c.Patience = time.Hour
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := c.Receive(ctx, "", "a", 1); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("ctx: %v", err)
	}
	status = http.StatusInternalServerError
	if _, err := c.Receive(t.Context(), "", "a", 1); !shop.IsStatus(err, status) {
		t.Errorf("500: %v", err)
	}
	for _, answer := range []string{"{}", "nonsense", `{"id":7}`} {
		server.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, answer) })
		if _, err := c.Receive(t.Context(), "", "a", 1); err == nil || !strings.Contains(err.Error(), "promises") {
			t.Errorf("%s: %v", answer, err)
		}
	}
}

func TestLists(t *testing.T) {
	var server *httptest.Server
	links := map[string]string{
		"":  `</ledger?cursor=2>; rel="next", </x>; rel="describedBy"`,
		"2": `</x>; rel="prev",<ledger?cursor=3>;rel=next`,
		"3": `</ledger>; rel="nextish"`,
	}
	server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		cursor := r.URL.Query().Get("cursor")
		w.Header().Set("Link", links[cursor])
		fmt.Fprintf(w, `{"items":[{"account":"page %s"}]}`, cursor)
	}))
	defer server.Close()
	c := client(t, server.URL)
	read := func() (pages []string, failed error) {
		for l, err := range c.Ledger(t.Context()) {
			if err != nil {
				return pages, err
			}
			pages = append(pages, l.Account)
		}
		return pages, nil
	}
	pages, err := read()
	if diff := cmp.Diff([]string{"page ", "page 2", "page 3"}, pages); diff != "" || err != nil {
		t.Errorf("%v\n%s", err, diff)
	}
	for _, bad := range []string{
		`<http://elsewhere.example/ledger>; rel="next"`, `</ledger?cursor=3>; rel="next"`, `<%zz>; rel="next"`,
	} {
		links["3"] = bad
		if _, err := read(); err == nil {
			t.Errorf("%s was followed", bad)
		}
	}
}

func TestOddSKUs(t *testing.T) {
	for _, sku := range []string{"BANK CHARGES", "gift_0001_40", "ä/ö?#%", ".", "..", "a//b"} {
		var path string
		server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { path = r.URL.Path }))
		c := client(t, server.URL)
		_, _ = c.Stock(t.Context(), sku)
		if path != "/stock/"+sku {
			t.Errorf("%q was asked for at %q", sku, path)
		}
		server.Close()
	}
}

func TestBadURLs(t *testing.T) {
	for _, u := range []string{"", "127.0.0.1:8080", "ftp://x", "http://", "http://%"} {
		if _, err := shop.New(u, 1); err == nil {
			t.Errorf("%q is no URL of a shop", u)
		}
	}
}
