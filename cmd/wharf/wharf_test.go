package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"

	"wharf/commands"
	"wharf/domain"
	"wharf/domain/inventory"
	"wharf/domain/orders"
	"wharf/domain/payments"
	"wharf/domain/shipping"
	"wharf/infra/embedded"
	"wharf/infra/shop"
	"wharf/projections"
)

// The programs are run as they are: the test's own binary is wharf when this variable says so.
const asWharf = "WHARF_TEST_RUN"

func TestMain(m *testing.M) {
	if os.Getenv(asWharf) != "" {
		os.Exit(run(os.Args[1:]))
	}
	os.Exit(m.Run())
}

func command(ctx context.Context, args ...string) *exec.Cmd {
	c := exec.CommandContext(ctx, os.Args[0], args...)
	c.Env = append(os.Environ(), asWharf+"=1")
	c.Cancel = func() error { return c.Process.Signal(syscall.SIGTERM) }
	return c
}

// wharf runs a program to its end.
func wharf(t *testing.T, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	var out, errs bytes.Buffer
	c := command(t.Context(), args...)
	c.Stdout, c.Stderr = &out, &errs
	err := c.Run()
	if c.ProcessState == nil {
		t.Fatal(err)
	}
	return out.String(), errs.String(), c.ProcessState.ExitCode()
}

func wantCode(t *testing.T, want int, args ...string) (stdout string) {
	t.Helper()
	stdout, stderr, code := wharf(t, args...)
	if code != want {
		t.Fatalf("wharf %s: exit %d, want %d\n%s", strings.Join(args, " "), code, want, stderr)
	}
	return stdout
}

type demo struct {
	url string
	cmd *exec.Cmd
}

// startDemo returns when the shop is open.
func startDemo(t *testing.T, dir string, args ...string) *demo {
	t.Helper()
	d := &demo{cmd: command(context.Background(), append([]string{"demo", "--addr", "127.0.0.1:0", "--data-dir", dir}, args...)...)}
	stderr, err := d.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.stop(t) })
	lines := bufio.NewScanner(stderr)
	var log strings.Builder
	for lines.Scan() {
		log.WriteString(lines.Text() + "\n")
		if _, after, ok := strings.Cut(lines.Text(), "The shop is open at "); ok {
			d.url, _, _ = strings.Cut(after, " ")
			go func() { _, _ = io.Copy(io.Discard, stderr) }()
			return d
		}
	}
	t.Fatalf("the shop did not open:\n%s", log.String())
	return nil
}

func (d *demo) stop(t *testing.T) {
	t.Helper()
	if d.cmd.ProcessState != nil {
		return
	}
	_ = d.cmd.Process.Signal(syscall.SIGTERM)
	if err := d.cmd.Wait(); err != nil {
		t.Errorf("the demo does not end in order: %v", err)
	}
}

func (d *demo) kill() {
	_ = d.cmd.Process.Kill()
	_ = d.cmd.Wait()
}

func (d *demo) client(t *testing.T) *shop.Client {
	t.Helper()
	c, err := shop.New(d.url, 8)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func receipt(t *testing.T) func(shop.Receipt, error) shop.Receipt {
	return func(r shop.Receipt, err error) shop.Receipt { t.Helper(); must(t, err); return r }
}

// invoices is a file of n invoices of two lines.
func invoices(t *testing.T, n int) string {
	var b strings.Builder
	b.WriteString("InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country\n")
	for i := range n {
		fmt.Fprintf(&b, "%d,HOT,a mug,2,2010-12-01 08:26:00,1.00,17850.0,United Kingdom\n", 536365+i)
		fmt.Fprintf(&b, "%d,COLD %d,a lamp,3,2010-12-01 08:26:00,2.50,,France\n", 536365+i, i%40)
	}
	path := filepath.Join(t.TempDir(), "invoices.csv")
	must(t, os.WriteFile(path, []byte(b.String()), 0o600))
	return path
}

// eventually waits for the order to come to the status.
func eventually(t *testing.T, c *shop.Client, order string, want orders.Status) shop.Order {
	t.Helper()
	for {
		o, err := c.Order(t.Context(), order)
		if err == nil && o.Status == want {
			return o
		}
		if err != nil && !shop.IsStatus(err, 404) {
			t.Fatal(err)
		}
		if o.Status == orders.StatusRejected || o.Status == orders.StatusExpired {
			t.Fatalf("the order is %s (%s), want %s", o.Status, o.Reason, want)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func xts(sku string, quantity, price int64) shop.NewOrder {
	return shop.NewOrder{Customer: "17850", Lines: []orders.Line{
		{SKU: sku, Quantity: quantity, UnitPrice: domain.Money{Amount: price, Currency: "XTS"}},
	}}
}

func TestTheWholeShop(t *testing.T) {
	if testing.Short() {
		t.Skip("runs all programs")
	}
	whole, dir := t, t.TempDir()
	d := startDemo(t, dir, "--order-deadline", "3s")
	c := d.client(t)
	ctx := t.Context()
	const sku = "white hanging/heart .. 85123a"
	receipt(t)(c.Receive(ctx, "", sku, 100))

	var way string
	t.Run("an order goes all the way", func(t *testing.T) {
		id := receipt(t)(c.Place(ctx, "k1", xts(sku, 6, 200))).ID
		way = id
		eventually(t, c, id, orders.StatusConfirmed)
		receipt(t)(c.Dispatch(ctx, "", id, "dhl", "t-1"))
		receipt(t)(c.Deliver(ctx, "", id))
		o := eventually(t, c, id, orders.StatusDelivered)
		if o.Total.Amount != 1200 || o.Shipment.Status != "delivered" {
			t.Errorf("the order is %+v", o)
		}
		for {
			p, err := c.Payment(ctx, id)
			must(t, err)
			if p.Status == "captured" {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		want := map[string]bool{
			"order.placed.v1": false, "stock.reserved.v1": true, "order.item_reserved.v1": true, "order.stock_confirmed.v1": true,
			"payment.authorization_requested.v1": true, "payment.authorized.v1": true, "order.confirmed.v1": true,
			"shipment.created.v1": true, "shipment.dispatched.v1": false, "order.shipped.v1": true, "stock.shipped.v1": true,
			"payment.capture_requested.v1": true, "payment.captured.v1": true, "shipment.delivered.v1": false, "order.delivered.v1": true,
		}
		// The history is a read model of its own, and comes to this by itself.
		for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			causes := map[string]bool{}
			for e, err := range c.History(ctx, id, 0) {
				must(t, err)
				causes[e.Type] = e.Cause != ""
			}
			diff := cmp.Diff(want, causes)
			if diff == "" {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal("events, and whether they have a cause:", diff)
			}
		}
	})

	t.Run("orders end in every other way", func(t *testing.T) {
		declined := receipt(t)(c.Place(ctx, "", xts(sku, 1, 101))).ID
		noStock := receipt(t)(c.Place(ctx, "", xts("never received", 1, 200))).ID
		late := receipt(t)(c.Place(ctx, "", xts(sku, 1, 112))).ID // the provider answers after the deadline
		cancelled := receipt(t)(c.Place(ctx, "", xts(sku, 1, 200))).ID
		eventually(t, c, cancelled, orders.StatusConfirmed)
		receipt(t)(c.Cancel(ctx, "", cancelled, "changed my mind"))
		eventually(t, c, cancelled, orders.StatusCancelled)
		for id, want := range map[string]orders.Status{declined: orders.StatusRejected, noStock: orders.StatusRejected, late: orders.StatusExpired} {
			for {
				o, err := c.Order(ctx, id)
				if err == nil && o.Status == want {
					break
				}
				time.Sleep(10 * time.Millisecond)
			}
		}
	})

	t.Run("killed in the middle of a load, started again, loaded again", func(t *testing.T) {
		d.stop(t)
		d = startDemo(whole, dir) // with time enough for every order
		file := invoices(t, 300)
		loading := command(ctx, "load", "--url", d.url, "--file", file)
		progress, err := loading.StderrPipe()
		must(t, err)
		must(t, loading.Start())
		lines := bufio.NewScanner(progress)
		for lines.Scan() && !strings.Contains(lines.Text(), "delivered") {
		}
		d.kill()
		_ = loading.Process.Kill()
		_ = loading.Wait()
		d = startDemo(whole, dir)

		// Queries go on, and never miss what was there, while all read models are built anew.
		c = d.client(t)
		before, err := c.Order(ctx, way)
		must(t, err)
		stop := make(chan struct{})
		var wg sync.WaitGroup
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				o, err := c.Order(ctx, before.ID)
				if err != nil || o.Status != before.Status || len(o.Lines) != len(before.Lines) {
					t.Errorf("during the replay an order is %+v: %v", o, err)
					return
				}
			}
		})
		wg.Go(func() {
			if _, stderr, code := wharf(t, "replay", "--all", "--data-dir", dir); code != 0 {
				t.Errorf("replay: exit %d\n%s", code, stderr)
			}
		})
		var report struct{ Placed, Delivered int }
		out := wantCode(t, 0, "load", "--url", d.url, "--file", file, "--json")
		must(t, json.Unmarshal([]byte(out), &report))
		close(stop)
		wg.Wait()
		if report.Placed != 300 || report.Delivered != 300 {
			t.Errorf("the load ends with %s", out)
		}
		wantCode(t, 0, "audit", "--url", d.url)
		again := wantCode(t, 0, "load", "--url", d.url, "--file", file, "--json")
		must(t, json.Unmarshal([]byte(again), &report))
		wantCode(t, 0, "audit", "--url", d.url)
		sales := int64(0)
		for line, err := range c.Sales(ctx) {
			must(t, err)
			if line.Revenue.Currency == "GBP" {
				sales += line.Revenue.Amount
			}
		}
		if sales != 300*(2*100+3*250) {
			t.Errorf("sales are %d", sales)
		}
	})

	t.Run("a replay can be trusted", func(t *testing.T) {
		in := func(args ...string) []string { return append(args, "--data-dir", dir) }
		var verified struct{ Items []struct{ Rows int64 } }
		must(t, json.Unmarshal([]byte(wantCode(t, 0, in("verify", "--json")...)), &verified))
		if len(verified.Items) != len(projections.All) {
			t.Errorf("%d read models were verified", len(verified.Items))
		}
		wantCode(t, 0, in("replay", "orders", "sales", "--rollback")...)
		wantCode(t, 0, in("verify", "orders", "sales")...)
		demo, err := embedded.ReadRuntime(dir)
		must(t, err)
		// Without Kafka, which it needs only to read what the previous build lacks: nothing, after a moment.
		for tries := 1; ; tries++ {
			_, stderr, code := wharf(t, "replay", "sales", "--rollback", "--database-url", demo.DatabaseURL, "--kafka-brokers", "127.0.0.1:1")
			if code == 0 {
				break
			}
			if tries == 5 || !strings.Contains(stderr, "no Kafka broker answers") {
				t.Fatal(stderr)
			}
		}
		if full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0); err == nil { // a verdict that nobody got
			c := command(t.Context(), in("verify", "orders")...)
			c.Stdout = full
			if _ = c.Run(); c.ProcessState.ExitCode() != 1 {
				t.Errorf("verify into a full disk: exit %d", c.ProcessState.ExitCode())
			}
			must(t, full.Close())
		}
		var id string
		for o, err := range c.Orders(ctx, "", "delivered") {
			must(t, err)
			id = o.ID
			break
		}
		if out := wantCode(t, 0, in("project", "orders", "--key", id)...); !strings.Contains(out, `"status": "delivered"`) {
			t.Errorf("the order is %s", out)
		}
		wantCode(t, 1, in("project", "orders", "--key", id, "--as-of", "2000-01-01T00:00:00Z")...)
		wantCode(t, 2, in("project", "orders", "--key", "x")...)
		if out := wantCode(t, 0, in("replay", "orders", "--key", id, "--until", "2100-01-01T00:00:00Z")...); !strings.Contains(out, "1 rows in the table") {
			t.Errorf("the part is %s", out)
		}
		if out := wantCode(t, 0, in("replay", "--all", "--dry-run")...); strings.Count(out, "would read") != len(projections.All) {
			t.Errorf("a dry run says %s", out)
		}
		if out := wantCode(t, 0, in("parked")...); out != "nothing is parked\n" {
			t.Errorf("parked says %s", out)
		}
		wantCode(t, 1, in("parked", "discard", "orders", "orders.events/0/1")...)

		// What somebody changed behind the projector's back is found, and mended.
		db, err := pgx.Connect(ctx, demo.DatabaseURL)
		must(t, err)
		defer db.Close(ctx)
		var table string
		must(t, db.QueryRow(ctx, "SELECT 'wharf_build_' || id || '.ledger' FROM wharf.builds WHERE model = 'ledger' AND state = 'live'").Scan(&table))
		_, err = db.Exec(ctx, "UPDATE "+table+" SET balance = balance + 1")
		must(t, err)
		wantCode(t, 1, in("verify", "ledger")...)
		if out := wantCode(t, 1, in("replay", "ledger", "--json")...); !strings.Contains(out, `"refused":true`) {
			t.Errorf("the replay says %s", out)
		}
		wantCode(t, 0, in("replay", "ledger", "--force")...)
		wantCode(t, 0, in("verify", "ledger")...)
	})

	t.Run("commands need no database, and a Postgres that was killed comes back", func(t *testing.T) {
		demo, err := embedded.ReadRuntime(dir)
		must(t, err)
		db, err := pgx.Connect(ctx, demo.DatabaseURL)
		must(t, err)
		defer db.Close(ctx)
		var server int
		must(t, db.QueryRow(ctx, `SELECT split_part(pg_read_file('postmaster.pid'), E'\n', 1)::int`).Scan(&server))
		must(t, syscall.Kill(server, syscall.SIGKILL))
		placed := receipt(t)(c.Place(ctx, "", xts(sku, 1, 200)))
		for {
			o, err := c.OrderSince(ctx, placed.ID, placed.Token)
			if shop.IsStatus(err, 503) {
				continue
			}
			must(t, err)
			if o.ID != placed.ID {
				t.Errorf("the order is %+v", o)
			}
			break
		}
		wantCode(t, 0, "verify", "--data-dir", dir)
	})

	t.Run("programs in a second terminal", func(t *testing.T) {
		if out := wantCode(t, 0, "projections", "--data-dir", dir, "--json"); !strings.Contains(out, `"items":[{`) {
			t.Errorf("projections print %s", out)
		}
		wantCode(t, 0, "topics", "--data-dir", dir, "--check-only")
		wantCode(t, 1, "topics", "--data-dir", dir, "--check-only", "--partitions", "7")
		wantCode(t, 1, "demo", "--data-dir", dir, "--addr", "127.0.0.1:0")
		wantCode(t, 0, "health", "--addr", strings.TrimPrefix(d.url, "http://"))
		wantCode(t, 1, "projections", "--data-dir", t.TempDir())
	})
}

func TestUsageErrorsExitWith2(t *testing.T) {
	for _, args := range [][]string{
		{}, {"nothing"}, {"demo", "--nothing"}, {"demo", "--partitions", "0"}, {"orders"}, {"replay"}, {"replay", "--all", "orders"},
		{"load", "--concurrency", "0"}, {"load", "--file", "/nothing"}, {"demo", "--order-deadline", "0s"}, {"audit", "--wait", "-1s"},
		{"audit", "--url", "nonsense"}, {"replay", "nothing"}, {"replay", "orders", "--key", ""},
		{"replay", "orders", "--until", ""}, {"replay", "orders", "--key", "x"}, {"replay", "orders", "--force", "--rollback"},
		{"replay", "orders", "--from-position", "orders.events/0/9", "--until", "orders.events/0/8"}, {"verify", "order"},
		{"project", "orders"}, {"project", "stock", "--key", "MUG", "--as-of", "nothing.events/0/1"}, {"parked", "show", "orders", "x"},
		{"projections", "--kafka-brokers", "localhost"}, {"projector", "--verify-every", "-1s", "--kafka-brokers", "x:1", "--database-url", "x"}, {"topics", "skip", "orders.events", "0", "0"}, {"demo", "--addr", "nonsense"},
	} {
		wantCode(t, 2, args...)
	}
	wantCode(t, 0, "--help")
	wantCode(t, 0, "demo", "--help")
}

// A policy on an event of a service that is not followed would never fire.
func TestEveryPolicyHasItsSource(t *testing.T) {
	vocabularies := map[string]domain.Events{"orders": orders.Events, "inventory": inventory.Events,
		"payments": payments.Events, "shipping": shipping.Events}
	check := func(service, event string) {
		for owner, vocabulary := range vocabularies {
			if _, known := vocabulary[event]; known && slices.Contains(sources[service], owner) {
				return
			}
		}
		t.Errorf("%s reacts to %s, and follows only %v", service, event, sources[service])
	}
	for _, p := range commands.Orders {
		check("orders", p.Event)
	}
	for _, p := range commands.Inventory {
		check("inventory", p.Event)
	}
	for _, p := range commands.Payments {
		check("payments", p.Event)
	}
	for _, p := range commands.Shipping {
		check("shipping", p.Event)
	}
}

// A Postgres whose cluster was deleted is not the one that the shop knows, so the demo ends, and says why.
func TestAPostgresThatLostItsClusterEndsTheDemo(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a Postgres")
	}
	dir, err := os.MkdirTemp("", "wharf-test-") // which the server's user can reach
	must(t, err)
	defer os.RemoveAll(dir)
	must(t, os.Chmod(dir, 0o755))
	postgres, err := embedded.StartPostgres(t.Context(), dir, slog.New(slog.DiscardHandler))
	must(t, err)
	clusters, err := filepath.Glob(filepath.Join(dir, "postgres-*"))
	must(t, err)
	for _, c := range clusters {
		must(t, os.RemoveAll(c))
	}
	must(t, syscall.Kill(postgres.PID(), syscall.SIGKILL))
	err = keepUp(t.Context(), &postgres, dir)
	if err == nil || !strings.Contains(err.Error(), "was gone") {
		t.Errorf("it says %v", err)
	}
	must(t, postgres.Stop())
}
