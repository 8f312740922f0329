package provider

import (
	"context"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"wharf/domain"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var quiet = slog.New(slog.DiscardHandler)

// start serves a provider and returns a client of it.
func start(t *testing.T, o Options, timeout time.Duration) (*Client, *Server) {
	t.Helper()
	o.Log = quiet
	s, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(s)
	c := NewClient(server.URL, timeout)
	t.Cleanup(func() { _ = s.Close(); c.Close(); server.Close() })
	return c, s
}

func ask(t *testing.T, c *Client, r Request) Answer {
	t.Helper()
	a, err := c.Do(t.Context(), r)
	if err != nil {
		t.Fatalf("%+v: %v", r, err)
	}
	return a
}

func gbp(n int64) domain.Money { return domain.Money{Amount: n, Currency: "GBP"} }

func request(kind string, amount domain.Money) Request {
	r := Request{Kind: kind, Key: "o1:" + kind, Order: "o1", Amount: amount}
	if kind != Authorize {
		r.AuthorizationKey = "o1:authorize"
	}
	return r
}

func TestOrdinaryLife(t *testing.T) {
	c, _ := start(t, Options{}, time.Second)
	refund2 := request(Refund, gbp(70))
	refund2.Key += "2"
	refund3 := request(Refund, gbp(31))
	refund3.Key += "3"
	euro := domain.Money{Amount: 1, Currency: "EUR"}
	recapture := request(Capture, gbp(1))
	recapture.Key += "2"
	for _, step := range []struct {
		what     string
		r        Request
		approved bool
	}{
		{"a capture of nothing", request(Capture, gbp(100)), false},
		{"the authorisation", request(Authorize, gbp(100)), true},
		{"a refund of nothing", refund2, false},
		{"a capture of too much", Request{Capture, "k", "o1:authorize", "o1", gbp(101)}, false},
		{"a capture in another currency", Request{Capture, "l", "o1:authorize", "o1", euro}, false},
		{"the capture", Request{Capture, "m", "o1:authorize", "o1", gbp(100)}, true},
		{"another capture", recapture, false},
		{"a void of what was captured", request(Void, gbp(100)), false},
		{"a refund", request(Refund, gbp(70)), true},
		{"a refund of too much", refund3, false},
		{"the rest", Request{Refund, "n", "o1:authorize", "o1", gbp(30)}, true},
	} {
		a := ask(t, c, step.r)
		if a.Approved != step.approved || a.Approved == (a.Reference == "") || a.Approved == (a.Reason != "") {
			t.Errorf("%s: %+v", step.what, a)
		}
	}
}

func TestVoidBarsALaterAuthorization(t *testing.T) {
	c, _ := start(t, Options{}, time.Second)
	if a := ask(t, c, request(Void, gbp(100))); !a.Approved {
		t.Errorf("void: %+v", a)
	}
	if a := ask(t, c, request(Authorize, gbp(100))); a.Approved {
		t.Errorf("authorisation after its void: %+v", a)
	}
	if a := ask(t, c, request(Capture, gbp(100))); a.Approved {
		t.Errorf("capture: %+v", a)
	}
}

// TestOneKeyOneAnswer restarts the provider between any two requests: what it answered stays true.
func TestOneKeyOneAnswer(t *testing.T) {
	dir := t.TempDir()
	rapid.Check(t, func(t *rapid.T) {
		f, err := os.CreateTemp(dir, "")
		if err != nil {
			t.Fatal(err)
		}
		_ = f.Close()
		s, err := Open(Options{File: f.Name(), Faults: Faults{Decline: 0.3}, Log: quiet})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = s.Close() }()
		first := map[Request]Answer{}
		used := map[string]Request{}
		var captured, refunded int64
		for range rapid.IntRange(1, 40).Draw(t, "requests") {
			r := Request{
				Kind: rapid.SampledFrom([]string{Authorize, Capture, Void, Refund}).Draw(t, "kind"),
				Key:  rapid.StringMatching("[a-h]").Draw(t, "key"), Order: "o", AuthorizationKey: "a",
				Amount: gbp(rapid.Int64Range(1, 3).Draw(t, "amount")),
			}
			if r.Kind == Authorize {
				r.AuthorizationKey, r.Key = "", "a"
			}
			a, _, err := s.do(r)
			if old, known := used[r.Key]; known && old != r {
				if err == nil {
					t.Fatalf("key %s was used for %+v and now for %+v", r.Key, old, r)
				}
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			used[r.Key] = r
			if old, known := first[r]; known && old != a {
				t.Fatalf("%+v: first %+v, now %+v", r, old, a)
			} else if !known && a.Approved {
				switch r.Kind {
				case Capture:
					captured += r.Amount.Amount
				case Refund:
					refunded += r.Amount.Amount
				}
			}
			first[r] = a
			authorized := int64(0)
			if first[used["a"]].Approved {
				authorized = used["a"].Amount.Amount
			}
			if authorized < captured || captured < refunded {
				t.Fatalf("authorised %d, captured %d, refunded %d", authorized, captured, refunded)
			}
			if rapid.Bool().Draw(t, "restart") {
				_ = s.Close()
				if s, err = Open(Options{File: f.Name(), Faults: Faults{Decline: 0.3}, Log: quiet}); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
}

func TestFileCutShort(t *testing.T) {
	name := filepath.Join(t.TempDir(), "deeds")
	open := func() *Server {
		s, err := Open(Options{File: name, Log: quiet})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s := open()
	first, _, _ := s.do(request(Authorize, gbp(5)))
	_ = s.Close()
	f, _ := os.OpenFile(name, os.O_APPEND|os.O_WRONLY, 0)
	_, _ = f.WriteString(`{"Kind":"capt`)
	_ = f.Close()
	s = open()
	if _, _, err := s.do(request(Capture, gbp(5))); err != nil {
		t.Fatal(err)
	}
	_ = s.Close()
	s = open()
	defer s.Close()
	if again, _, err := s.do(request(Authorize, gbp(5))); err != nil || again != first {
		t.Errorf("%+v, %v; first %+v", again, err, first)
	}
	if len(s.books.deeds) != 2 {
		t.Errorf("it knows %d deeds", len(s.books.deeds))
	}
	if err := os.WriteFile(name, []byte("{}\nnonsense\n{}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(Options{File: name}); err == nil || !strings.Contains(err.Error(), "line 2") {
		t.Errorf("a broken line in the middle: %v", err)
	}
}

// TestChosenFaults goes through the table of the package comment: how many tries each request takes, and how it ends.
func TestChosenFaults(t *testing.T) {
	t.Parallel()
	type outcome struct {
		Tries    int
		Approved bool
	}
	ok := outcome{1, true}
	for code, want := range map[int64]map[string]outcome{
		0:  {Authorize: ok, Capture: ok, Refund: ok},
		1:  {Authorize: {1, false}, Capture: {1, false}, Refund: {1, false}},
		2:  {Authorize: {2, true}, Capture: ok, Refund: ok},
		3:  {Authorize: {2, true}, Capture: ok, Refund: ok},
		4:  {Authorize: {3, true}, Capture: ok, Refund: ok},
		5:  {Authorize: ok, Capture: {1, false}, Refund: {1, false}},
		6:  {Authorize: ok, Capture: ok, Refund: {1, false}},
		7:  {Authorize: ok, Capture: {2, true}, Refund: ok},
		8:  {Authorize: ok, Void: {2, true}},
		9:  {Authorize: ok, Capture: ok, Refund: {2, true}},
		10: {Authorize: ok, Capture: {3, true}, Refund: ok},
		11: {Authorize: {3, true}, Capture: {3, true}, Refund: {3, true}},
		12: {Authorize: {2, true}, Capture: ok, Refund: ok},
		13: {Authorize: ok, Void: ok},
	} {
		for _, currency := range []string{"XTS", "GBP"} {
			c, _ := start(t, Options{}, 100*time.Millisecond)
			for _, kind := range []string{Authorize, Capture, Void, Refund} {
				w, asked := want[kind]
				if !asked {
					continue
				}
				if currency != "XTS" {
					w = ok
				}
				amount := domain.Money{Amount: 4200 + code, Currency: currency}
				if kind == Refund {
					amount.Amount = 1 // the fault is the order's, whatever is refunded
				}
				got := outcome{}
				for err := error(io.EOF); err != nil && got.Tries < 5; got.Tries++ {
					var a Answer
					a, err = c.Do(t.Context(), request(kind, amount))
					got.Approved = a.Approved
				}
				if diff := cmp.Diff(w, got); diff != "" {
					t.Errorf("%s …%02d %s (-want +got):\n%s", currency, code, kind, diff)
				}
			}
		}
	}
}

func TestFaultsByChance(t *testing.T) {
	for name, step := range map[string]struct {
		faults   Faults
		answered bool
		approved bool
	}{
		"decline": {Faults{Decline: 1}, true, false},
		"timeout": {Faults{Timeout: 1}, false, true},
		"repeat":  {Faults{Repeat: 1}, false, true},
		"slow":    {Faults{Slow: 1, Delay: time.Hour}, false, true},
		"none":    {Faults{Delay: time.Hour}, true, true},
	} {
		c, s := start(t, Options{Faults: step.faults}, 50*time.Millisecond)
		a, err := c.Do(t.Context(), request(Authorize, gbp(1)))
		if (err == nil) != step.answered || step.answered && a.Approved != step.approved {
			t.Errorf("%s: %+v, %v", name, a, err)
		}
		s.mu.Lock()
		if d := s.books.deeds["o1:authorize"]; d.Approved != step.approved || len(s.books.deeds) != 1 {
			t.Errorf("%s: what was done is %+v", name, d)
		}
		s.mu.Unlock()
	}
}

func TestCloseLetsGo(t *testing.T) {
	s, err := Open(Options{Faults: Faults{Timeout: 1}, Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	arrived := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		close(arrived)
		s.ServeHTTP(w, r)
	}))
	defer server.Close()
	c := NewClient(server.URL, time.Minute)
	defer c.Close()
	answered := make(chan error)
	go func() {
		_, err := c.Do(context.Background(), request(Authorize, gbp(1)))
		answered <- err
	}()
	<-arrived
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-answered; err == nil {
		t.Error("a request that is let go was answered")
	}
}

func TestBadRequests(t *testing.T) {
	c, _ := start(t, Options{}, time.Second)
	good := `{"order":"o","amount":{"amount":1,"currency":"GBP"}}`
	for name, step := range map[string]struct {
		method, path, contentType, key, body string
		status                               int
	}{
		"good":          {"POST", "/authorizations", "application/json; charset=utf-8", "k", good, 200},
		"same again":    {"POST", "/authorizations", "application/json", "k", good, 200},
		"other request": {"POST", "/authorizations", "application/json", "k", strings.Replace(good, "1", "2", 1), 422},
		"no key":        {"POST", "/authorizations", "application/json", "", good, 422},
		"GET":           {"GET", "/authorizations", "", "", "", 405},
		"elsewhere":     {"POST", "/elsewhere", "application/json", "k", good, 404},
		"form":          {"POST", "/authorizations", "text/plain", "k", good, 415},
		"no JSON":       {"POST", "/authorizations", "application/json", "k", "secret", 400},
		"two values":    {"POST", "/authorizations", "application/json", "k", good + good, 400},
		"unknown field": {"POST", "/authorizations", "application/json", "k", `{"secret":1}`, 400},
		"huge":          {"POST", "/authorizations", "application/json", "k", strings.Repeat(" ", maxBody+1), 413},
		"no amount":     {"POST", "/authorizations", "application/json", "k", `{"order":"o"}`, 422},
		"no currency":   {"POST", "/authorizations", "application/json", "k", `{"order":"o","amount":{"amount":1}}`, 422},
		"of nothing":    {"POST", "/captures", "application/json", "k", good, 422},
		"alive":         {"GET", "/livez", "", "", "", 200},
		"ready":         {"GET", "/readyz", "", "", "", 200},
	} {
		if name == "same again" || name == "other request" { // they need a first one, whatever the order
			ask(t, c, Request{Kind: Authorize, Key: "k", Order: "o", Amount: gbp(1)})
		}
		r, _ := http.NewRequestWithContext(t.Context(), step.method, c.base+step.path, strings.NewReader(step.body))
		r.Header.Set("Content-Type", step.contentType)
		r.Header.Set("Idempotency-Key", step.key)
		resp, err := c.http.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		problem := resp.Header.Get("Content-Type") == "application/problem+json"
		if resp.StatusCode != step.status || problem != (step.status >= 400) || strings.Contains(string(body), "secret") {
			t.Errorf("%s: %s %s, want %d", name, resp.Status, body, step.status)
		}
	}
}
