package load

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
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

const header = "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country\n"

func write(t *testing.T, content string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "invoices.csv")
	if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// parse reads a file of those rows, and returns its orders, the counts and the numbers of the bad lines.
func parse(t *testing.T, n int, content string) ([]order, Report, []int) {
	t.Helper()
	var lines []int
	f, err := readFile(write(t, content), func(line int, _ error) { lines = append(lines, line) })
	if err != nil {
		t.Fatal(err)
	}
	var r Report
	return f.choose(n, &r, func(string, ...any) {}), r, lines
}

func line(sku string, quantity, pence int64) orders.Line {
	return orders.Line{SKU: sku, Quantity: quantity, UnitPrice: domain.Money{Amount: pence, Currency: "GBP"}}
}

func invoiceOrder(number, customer string, lines ...orders.Line) order {
	return order{key: "invoice-" + number, name: "invoice " + number, customer: customer, lines: lines}
}

func TestReadInvoices(t *testing.T) {
	content := header +
		"536365,85123A,\"WHITE, HANGING \"\"HEART\"\"\",6,2010-12-01 08:26:00,2.55,17850.0,United Kingdom\n" +
		"536366,71053,X,6,2010-12-01 08:26:00,3.4,,United Kingdom\n" +
		"C536367,71053,X,-6,2010-12-01 08:26:00,3.39,17850.0,United Kingdom\n" +
		"536368,BANK CHARGES,X,1,2010-12-01 08:26:00,0.001,,United Kingdom\n" + // skipped: no line is left
		"536365,85123A,X,1,2010-12-01 08:26:00,2.950,17850.0,United Kingdom\n" + // stands apart from its first row
		"536365,85123A,X,-1,2010-12-01 08:26:00,2.95,17850.0,United Kingdom\n" +
		"536365,85123A,X,1,2010-12-01 08:26:00,0.0,17850.0,United Kingdom\n" +
		"536365,85123A,X,1,2010-12-01 08:26:00,1.005,17850.0,United Kingdom\n" +
		"A536369,B,X,1,2010-12-01 08:26:00,-11062.06,,United Kingdom\n" +
		"C536367,71054,X,-6,2010-12-01 08:26:00,3.39,17850.0,United Kingdom\n" +
		"536370,gift_0001_40,\"two\nlines\",1,2010-12-01 08:26:00,7,12.0,United Kingdom"
	want := []order{
		invoiceOrder("536365", "17850", line("85123A", 6, 255), line("85123A", 1, 295)),
		invoiceOrder("536366", "guest", line("71053", 6, 340)),
		invoiceOrder("536370", "12", line("gift_0001_40", 1, 700)),
	}
	var zipped bytes.Buffer
	z := gzip.NewWriter(&zipped)
	_, _ = z.Write([]byte(content))
	_ = z.Close()
	for name, content := range map[string]string{
		"plain": content, "gzipped": zipped.String(), "BOM": "\ufeff" + content,
		"CRLF":        strings.ReplaceAll(content, "\n", "\r\n"),
		"blank lines": strings.ReplaceAll(content, "Kingdom\n", "Kingdom\n\n\n"),
	} {
		got, r, bad := parse(t, 0, content)
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(order{})); diff != "" || bad != nil {
			t.Errorf("%s: bad lines %v (-want +got):\n%s", name, bad, diff)
		}
		if r.LinesLeftOut != 4 || r.InvoicesSkipped != 3 {
			t.Errorf("%s: %d lines left out, %d invoices skipped", name, r.LinesLeftOut, r.InvoicesSkipped)
		}
	}
	got, r, _ := parse(t, 1, content)
	if len(got) != 1 || r.LinesLeftOut != 3 || r.InvoicesSkipped != 0 {
		t.Errorf("the first order: %d orders, %+v", len(got), r)
	}
}

func TestBadRows(t *testing.T) {
	good := func(n int) string { return fmt.Sprintf("%d,A,X,1,2010-12-01,1.00,,UK\n", n) }
	for name, bad := range map[string]string{
		"too few columns":  "5,A\n",
		"too many columns": "5,A,X,1,2010-12-01,1.00,,UK,?\n",
		"bare quote":       "5,A,X\"Y,1,2010-12-01,1.00,,UK\n",
		"open quote":       "5,A,\"X,1,2010-12-01,1.00,,UK\n",
		"open quote first": "\"5,A,X,1,2010-12-01,1.00,,UK\n",
		"no quantity":      "5,A,X,,2010-12-01,1.00,,UK\n",
		"half a unit":      "5,A,X,0.5,2010-12-01,1.00,,UK\n",
		"words":            "5,A,X,many,2010-12-01,1.00,,UK\n",
		"too many units":   "5,A,X,1000001,2010-12-01,1.00,,UK\n",
		"no price":         "5,A,X,1,2010-12-01,cheap,,UK\n",
		"odd price":        "5,A,X,1,2010-12-01,1.2x34,,UK\n",
		"exponent":         "5,A,X,1,2010-12-01,1e3,,UK\n",
		"huge price":       "5,A,X,1,2010-12-01,99999999999999999999.00,,UK\n",
		"no SKU":           "5,,X,1,2010-12-01,1.00,,UK\n",
		"long SKU":         "5," + strings.Repeat("A", 65) + ",X,1,2010-12-01,1.00,,UK\n",
		"no text":          "5,\xff,X,1,2010-12-01,1.00,,UK\n",
		"control":          "5,A\x00,X,1,2010-12-01,1.00,,UK\n",
		"no invoice":       ",A,X,1,2010-12-01,1.00,,UK\n",
		"endless":          "5,A," + strings.Repeat("X", 3*maxRow) + ",1,2010-12-01,1.00,,UK\n",
	} {
		got, r, lines := parse(t, 0, header+good(1)+good(2)+bad+good(3)+bad+good(4)+good(1))
		var numbers []string
		for _, o := range got {
			numbers = append(numbers, o.name)
		}
		if diff := cmp.Diff([]string{"invoice 1", "invoice 2", "invoice 3", "invoice 4"}, numbers); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
		if len(got) > 0 && len(got[0].lines) != 2 {
			t.Errorf("%s: the row after it is lost", name)
		}
		if diff := cmp.Diff([]int{4, 6}, lines); diff != "" || r.LinesLeftOut+r.InvoicesSkipped != 0 {
			t.Errorf("%s: %+v, lines (-want +got):\n%s", name, r, diff)
		}
	}
}

func TestHugeInvoices(t *testing.T) {
	got, r, _ := parse(t, 0, header+strings.Repeat("1,A,X,1,d,1.00,,UK\n", 2001)+
		strings.Repeat("2,A,X,1,d,1.00,,UK\n", 2000)+"3,A,X,1000000,d,92233720368547758.00,,UK\n")
	if len(got) != 1 || got[0].name != "invoice 2" || r.InvoicesSkipped != 2 {
		t.Errorf("%d orders, %+v", len(got), r)
	}
}

func TestNoInvoices(t *testing.T) {
	for _, content := range []string{"", "a,b,c\n1,2,3\n", "\x1f\x8bnonsense", "\"\n"} {
		if _, err := readFile(write(t, content), func(int, error) {}); err == nil {
			t.Errorf("%q is a file of invoices", content)
		}
	}
}

// fileOf has orders 1 to n: of two SKUs, and of one that the others have too, which is asked for more and more.
func fileOf(t *testing.T, n int) (name string, total int64) {
	t.Helper()
	var b strings.Builder
	b.WriteString(header)
	for i := 1; i <= n; i++ {
		fmt.Fprintf(&b, "%d,HOT SKU,X,%d,d,1.50,17850.0,UK\n%d,SKU%d,X,2,d,0.50,,UK\n", i, i%5+1, i, i%20)
		total += int64(i%5+1)*150 + 100
	}
	return write(t, b.String()), total
}

// figures is the report without what depends on the clock.
func figures(r Report) Report {
	r.CommandsPerS, r.P50, r.P99 = 0, 0, 0
	return r
}

func TestRunTwice(t *testing.T) {
	s := shoptest.New()
	s.Step = 300 // slower than orders come in, so that much is open at once
	url := s.Start(t)
	file, total := fileOf(t, 300)
	want := Report{Placed: 300, Confirmed: 300, Delivered: 300}
	r, err := Run(t.Context(), Options{URL: url, File: file, Stock: 100})
	if diff := cmp.Diff(want, figures(r)); diff != "" || err != nil {
		t.Fatalf("%v (-want +got):\n%s", err, diff)
	}
	if r.CommandsPerS <= 0 || r.P50 <= 0 || r.P99 < r.P50 {
		t.Errorf("no figures: %+v", r)
	}
	c, err := shop.New(url, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for stock, err := range c.Stocks(t.Context()) {
		if err != nil || stock.Available != 0 || stock.Reserved != 0 {
			t.Errorf("%+v, %v", stock, err)
		}
	}
	for sales, err := range c.Sales(t.Context()) {
		if err != nil || sales.Revenue.Amount != total {
			t.Errorf("%+v, %v, want %d", sales, err, total)
		}
	}
	events := s.Events()
	r, err = Run(t.Context(), Options{URL: url, File: file, Stock: 100})
	if diff := cmp.Diff(want, figures(r)); diff != "" || err != nil {
		t.Errorf("the second time: %v (-want +got):\n%s", err, diff)
	}
	if s.Events() != events {
		t.Errorf("the second run made %d events", s.Events()-events)
	}
}

func TestNotEnoughStock(t *testing.T) {
	s := shoptest.New()
	file, _ := fileOf(t, 100)
	r, err := Run(t.Context(), Options{URL: s.Start(t), File: file, Stock: 80, Orders: 90})
	if err != nil || r.Placed != 90 || r.Rejected == 0 || r.Delivered+r.Rejected != 90 || r.Confirmed != r.Delivered {
		t.Errorf("%+v, %v", r, err)
	}
}

// TestFaults fails commands in every way that passes, many at once, and other people's orders are in the way.
func TestFaults(t *testing.T) {
	s := shoptest.New()
	s.Step = 200
	s.Decline = func(order string) bool { return order[0] == '0' }
	s.Faulty = func(n int) (before, after int) {
		return map[int]int{3: 503, 7: 409, 11: 1}[n%20], map[int]int{5: 504, 13: 1, 17: 409}[n%20]
	}
	url := s.Start(t)
	c, err := shop.New(url, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Receive(t.Context(), "", "OTHER", 5); err != nil {
		t.Fatal(err)
	}
	other, err := c.Place(t.Context(), "", shop.NewOrder{Customer: "other", Lines: []orders.Line{line("OTHER", 5, 1)}})
	if err != nil {
		t.Fatal(err)
	}
	file, _ := fileOf(t, 100)
	r, err := Run(t.Context(), Options{URL: url, File: file, Stock: 100})
	if err != nil || r.Placed != 100 || r.Delivered+r.Rejected != 100 || r.Rejected == 0 || r.Delivered == 0 {
		t.Errorf("%+v, %v", r, err)
	}
	if o, err := c.Order(t.Context(), other.ID); err != nil || o.Status == orders.StatusDelivered {
		t.Errorf("somebody else's order: %+v, %v", o, err)
	}
}

// TestGoesOnAfterAnInterruption stops a run while orders are in every state, and runs again.
func TestGoesOnAfterAnInterruption(t *testing.T) {
	s := shoptest.New()
	s.Step = 100
	ctx, interrupt := context.WithCancel(t.Context())
	s.Faulty = func(n int) (int, int) {
		if n == 250 {
			interrupt()
		}
		return 0, 0
	}
	url := s.Start(t)
	file, _ := fileOf(t, 100)
	r, err := Run(ctx, Options{URL: url, File: file, Stock: 100})
	if !errors.Is(err, context.Canceled) || r.Delivered == 100 {
		t.Fatalf("%+v, %v", r, err)
	}
	r, err = Run(t.Context(), Options{URL: url, File: file, Stock: 100})
	if diff := cmp.Diff(Report{Placed: 100, Confirmed: 100, Delivered: 100}, figures(r)); diff != "" || err != nil {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
}

func TestRefusedOrderIsSkipped(t *testing.T) {
	s := shoptest.New()
	url := s.Start(t)
	file := write(t, header+"1,A,X,1,d,1.00,,UK\n")
	if _, err := Run(t.Context(), Options{URL: url, File: file, Stock: 100}); err != nil {
		t.Fatal(err)
	}
	var progress bytes.Buffer
	r, err := Run(t.Context(), Options{URL: url, Stock: 100, Progress: &progress,
		File: write(t, header+"1,A,X,2,d,1.00,,UK\nnonsense\n2,A,X,1,d,1.00,,UK\n")})
	want := Report{Placed: 1, Confirmed: 1, Delivered: 1, InvoicesSkipped: 1}
	if diff := cmp.Diff(want, figures(r)); diff != "" || err != nil {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
	for _, said := range []string{"line 3 skipped", "invoice 1 was not taken"} {
		if !strings.Contains(progress.String(), said) {
			t.Errorf("it did not say %q:\n%s", said, progress.String())
		}
	}
}

func TestGivesUpWhenNothingMoves(t *testing.T) {
	s := shoptest.New()
	s.Tamper = func(path string, v any) any {
		if path == "/shipments" {
			return map[string]any{"items": []any{}} // so that nothing is ever sent off
		}
		return v
	}
	file, _ := fileOf(t, 3)
	r, err := Run(t.Context(), Options{URL: s.Start(t), File: file, Stock: 100, Patience: 500 * time.Millisecond})
	if err == nil || !strings.Contains(err.Error(), "3 orders are not final") || r.Placed != 3 || r.Confirmed != 3 {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestMadeUp(t *testing.T) {
	s := shoptest.New()
	r, err := Run(t.Context(), Options{URL: s.Start(t), Stock: 100})
	if err != nil || r.Placed != 100 || r.Delivered+r.Cancelled != 100 || r.Delivered == 0 {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestNobodyThere(t *testing.T) {
	if _, err := Run(t.Context(), Options{URL: "http://127.0.0.1:1", Patience: time.Millisecond}); err == nil {
		t.Error("it ran without a shop")
	}
	_, err := Run(t.Context(), Options{URL: "http://127.0.0.1:1", File: "no such file"})
	if !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}

func TestCustomers(t *testing.T) {
	s := shoptest.New()
	ctx, leave := context.WithCancel(t.Context())
	url := s.Start(t)
	done := make(chan error)
	go func() { done <- Customers(ctx, url, 5, slog.New(slog.DiscardHandler)) }()
	c, err := shop.New(url, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for delivered := 0; delivered < 3; {
		delivered = 0
		for _, err := range c.Orders(t.Context(), "", "delivered") {
			if err != nil {
				t.Fatal(err)
			}
			delivered++
		}
	}
	leave()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestReportNames(t *testing.T) {
	data, err := json.Marshal(Report{})
	if err != nil {
		t.Fatal(err)
	}
	var names map[string]any
	if err := json.Unmarshal(data, &names); err != nil {
		t.Fatal(err)
	}
	want := strings.Fields("placed confirmed delivered rejected cancelled expired " +
		"lines_left_out invoices_skipped read_back stale_reads commands_per_s p50_ms p99_ms")
	if diff := cmp.Diff(slices.Sorted(slices.Values(want)), slices.Sorted(maps.Keys(names))); diff != "" {
		t.Error(diff)
	}
	for _, name := range want {
		if !strings.Contains(Report{}.String(), name) {
			t.Errorf("the table has no %s", name)
		}
	}
}
