// Package shop answers the question "how does a program talk to Wharf from outside?". It is a small typed client of
// the HTTP API: Client and its methods in this file, the shapes of the answers in shapes.go.
package shop

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"wharf/domain"
)

const (
	tryTimeout = 30 * time.Second
	firstPause = 50 * time.Millisecond
	maxPause   = 2 * time.Second
	maxAnswer  = 64 << 20 // bytes of one answer
	pageSize   = 200      // items of one page; the most the API gives
)

// Client talks to one Wharf. It is safe for concurrent use.
//
// Each call repeats what may have failed in passing (no connection, 429, 502, 503, 504, and the 409 of a command that
// lost too many races) after jittered pauses of up to 2 s, or of what Retry-After asks for, until it has an answer,
// ctx ends, or Patience is used up. Every try of a command carries the same Idempotency-Key, so it is done once.
type Client struct {
	base *url.URL
	http *http.Client

	// Patience bounds one call with all its tries. New sets two minutes.
	Patience time.Duration
}

// New is a client of the Wharf at base, such as "http://127.0.0.1:8080", that keeps as many connections open as there
// are to be calls at once.
func New(base string, concurrency int) (*Client, error) {
	u, err := url.Parse(strings.TrimRight(base, "/"))
	if err != nil {
		return nil, fmt.Errorf("the URL of the shop: %w", err)
	}
	if u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return nil, errors.New("the URL of the shop must read like http://127.0.0.1:8080")
	}
	dialer := &net.Dialer{Timeout: 5 * time.Second}
	return &Client{u, &http.Client{
		Timeout: tryTimeout,
		Transport: &http.Transport{
			Proxy: http.ProxyFromEnvironment, DialContext: dialer.DialContext, TLSHandshakeTimeout: 5 * time.Second,
			MaxIdleConns: concurrency, MaxIdleConnsPerHost: concurrency, IdleConnTimeout: 30 * time.Second,
			DisableCompression: true, // the shop is next door: compressing would cost more than it saves
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}, 2 * time.Minute}, nil
}

// Close drops idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Problem is an answer of the API that is not what was asked for (RFC 9457).
type Problem struct {
	Status int    `json:"status"`
	Type   string `json:"type"` // stable, for programs
	Title  string `json:"title"`
	Detail string `json:"detail"`

	retryAfter time.Duration
}

// Error tells the problem in one line.
func (p *Problem) Error() string {
	return fmt.Sprintf("%d %s: %s", p.Status, p.Title, cmp.Or(p.Detail, p.Type))
}

// Code is the last part of the type, such as "conflict" of "urn:wharf:problem:conflict".
func (p *Problem) Code() string {
	return p.Type[strings.LastIndexAny(p.Type, "/:#")+1:]
}

// Passing says that the same request may well succeed a little later.
func (p *Problem) Passing() bool {
	switch p.Status {
	case http.StatusTooManyRequests, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout,
		http.StatusRequestTimeout: // a server that was paused says so of a request that it had not read by then
		return true
	}
	return p.Status == http.StatusConflict && p.Code() == "conflict"
}

// IsStatus says whether err is a Problem with that status.
func IsStatus(err error, status int) bool {
	var p *Problem
	return errors.As(err, &p) && p.Status == status
}

// do sends one request until it has an answer, and decodes it into out, unless that is nil.
func (c *Client) do(ctx context.Context, method string, u *url.URL, headers map[string]string, in, out any) (http.Header, error) {
	var body []byte
	if in != nil {
		var err error
		if body, err = json.Marshal(in); err != nil {
			return nil, fmt.Errorf("encode the request: %w", err)
		}
	}
	deadline := time.Now().Add(c.Patience)
	pause := firstPause
	for {
		header, err := c.try(ctx, method, u, headers, body, out)
		var p *Problem
		switch {
		case err == nil:
			return header, nil
		case ctx.Err() != nil:
			return nil, fmt.Errorf("%s %s: %w", method, u.Path, ctx.Err())
		case errors.As(err, &p) && !p.Passing(), errors.Is(err, errAnswer), !time.Now().Before(deadline):
			return nil, fmt.Errorf("%s %s: %w", method, u.Path, err)
		}
		wait := pause/2 + rand.N(pause/2+1)
		if p != nil && p.retryAfter > wait {
			wait = p.retryAfter
		}
		if err := sleep(ctx, min(wait, time.Until(deadline))); err != nil {
			return nil, fmt.Errorf("%s %s: %w", method, u.Path, err)
		}
		pause = min(2*pause, maxPause)
	}
}

// errAnswer marks an answer of status 2xx that is not what the API promises. Asking again would not help.
var errAnswer = errors.New("the answer is not what the API promises")

func (c *Client) try(ctx context.Context, method string, u *url.URL, headers map[string]string, body []byte, out any) (
	http.Header, error) {
	req, err := http.NewRequestWithContext(ctx, method, u.String(), bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	for name, value := range headers {
		req.Header.Set(name, value)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		if e := (*url.Error)(nil); errors.As(err, &e) {
			err = e.Err // without the method and the URL, which do adds
		}
		return nil, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return nil, fmt.Errorf("read the answer: %w", err)
	}
	if len(data) > maxAnswer {
		return nil, fmt.Errorf("%w: it is larger than %d bytes", errAnswer, maxAnswer)
	}
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		p := &Problem{}
		_ = json.Unmarshal(data, p) // a proxy's page is no problem+json: the status alone tells
		p.Status, p.Title = resp.StatusCode, cmp.Or(p.Title, http.StatusText(resp.StatusCode))
		if s, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && s > 0 {
			p.retryAfter = min(time.Duration(s)*time.Second, 10*time.Second)
		}
		return nil, p
	}
	if out != nil {
		if err := json.Unmarshal(data, out); err != nil {
			return nil, fmt.Errorf("%w: %w", errAnswer, err)
		}
	}
	return resp.Header, nil
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Receipt is the answer to an accepted command.
type Receipt struct {
	ID      string `json:"id"`
	Version int64  `json:"version"`
	Token   string `json:"-"` // the Consistency-Token: where everything the command did is public
}

// command posts. Without a key it makes one up, so that at least its own tries are one command.
func (c *Client) command(ctx context.Context, key string, in any, path ...string) (Receipt, error) {
	var r Receipt
	if key == "" {
		key = uuid.NewString()
	}
	header, err := c.do(ctx, http.MethodPost, c.url(nil, path...), map[string]string{"Idempotency-Key": key}, in, &r)
	if err == nil && r.ID == "" {
		err = fmt.Errorf("POST %s: %w: it has no id", c.url(nil, path...).Path, errAnswer)
	}
	if err != nil {
		return Receipt{}, err
	}
	r.Token = header.Get("Consistency-Token")
	return r, nil
}

// url is the base's with further segments, escaped, and a query.
func (c *Client) url(query url.Values, segments ...string) *url.URL {
	for i, s := range segments {
		segments[i] = url.PathEscape(s)
		if s == "." || s == ".." { // a SKU may be called so, and JoinPath would take it for a step
			segments[i] = strings.ReplaceAll(s, ".", "%2E")
		}
	}
	u := c.base.JoinPath(segments...)
	u.RawQuery = query.Encode()
	return u
}

// Place places an order. Its receipt's ID is the order's.
func (c *Client) Place(ctx context.Context, key string, o NewOrder) (Receipt, error) {
	return c.command(ctx, key, o, "orders")
}

// Cancel cancels an order, or asks the shipment to.
func (c *Client) Cancel(ctx context.Context, key, order, reason string) (Receipt, error) {
	return c.command(ctx, key, map[string]any{"reason": reason}, "orders", order, "cancel")
}

// Receive takes units of a SKU in.
func (c *Client) Receive(ctx context.Context, key, sku string, quantity int64) (Receipt, error) {
	return c.command(ctx, key, map[string]any{"quantity": quantity}, "stock", sku, "receive")
}

// Adjust corrects the count of a SKU.
func (c *Client) Adjust(ctx context.Context, key, sku string, delta int64, reason string) (Receipt, error) {
	return c.command(ctx, key, map[string]any{"delta": delta, "reason": reason}, "stock", sku, "adjust")
}

// Dispatch sends an order's shipment off.
func (c *Client) Dispatch(ctx context.Context, key, order, carrier, tracking string) (Receipt, error) {
	return c.command(ctx, key, map[string]any{"carrier": carrier, "tracking": tracking}, "shipments", order, "dispatch")
}

// Deliver hands an order's shipment over.
func (c *Client) Deliver(ctx context.Context, key, order string) (Receipt, error) {
	return c.command(ctx, key, nil, "shipments", order, "deliver")
}

// Refund pays part or all of an order's payment back.
func (c *Client) Refund(ctx context.Context, key, order string, amount domain.Money) (Receipt, error) {
	return c.command(ctx, key, map[string]any{"amount": amount}, "payments", order, "refund")
}

// get reads one thing. IsStatus(err, 404) when there is none.
func get[T any](ctx context.Context, c *Client, path ...string) (T, error) {
	var v T
	_, err := c.do(ctx, http.MethodGet, c.url(nil, path...), nil, nil, &v)
	return v, err
}

// list reads a list, page by page as it is ranged over. An error is the last that it yields.
func list[T any](ctx context.Context, c *Client, query url.Values, path ...string) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var zero T
		if query == nil {
			query = url.Values{}
		}
		if query.Get("limit") == "" {
			query.Set("limit", strconv.Itoa(pageSize))
		}
		for u := c.url(query, path...); u != nil; {
			var page struct {
				Items []T `json:"items"`
			}
			header, err := c.do(ctx, http.MethodGet, u, nil, nil, &page)
			if err != nil {
				yield(zero, err)
				return
			}
			for _, item := range page.Items {
				if !yield(item, nil) {
					return
				}
			}
			next, err := nextPage(u, header)
			if err != nil {
				yield(zero, err)
				return
			}
			u = next
		}
	}
}

// nextPage is where Link: <…>; rel="next" points to, nil without one. It must stay at the same origin: the client
// follows no one elsewhere.
func nextPage(here *url.URL, header http.Header) (*url.URL, error) {
	for _, link := range strings.Split(strings.Join(header.Values("Link"), ","), ",") {
		target, params, _ := strings.Cut(strings.TrimSpace(link), ">")
		target, bracket := strings.CutPrefix(target, "<")
		rel := strings.ReplaceAll(strings.ReplaceAll(params, " ", ""), `"`, "")
		if !bracket || !strings.Contains(rel+";", ";rel=next;") {
			continue
		}
		next, err := here.Parse(target)
		if err != nil {
			return nil, fmt.Errorf("GET %s: %w: the link to the next page: %w", here.Path, errAnswer, err)
		}
		if next.Host != here.Host || next.Scheme != here.Scheme || next.String() == here.String() {
			return nil, fmt.Errorf("GET %s: %w: the next page is elsewhere, or this one again", here.Path, errAnswer)
		}
		return next, nil
	}
	return nil, nil
}

// Orders lists orders, newest first, without their lines; an empty customer or status means any.
func (c *Client) Orders(ctx context.Context, customer, status string) iter.Seq2[Order, error] {
	return list[Order](ctx, c, filter("customer", customer, "status", status), "orders")
}

// Order is one order with its lines.
func (c *Client) Order(ctx context.Context, id string) (Order, error) {
	return get[Order](ctx, c, "orders", id)
}

// OrderSince reads an order as it is once the read model knows what the command did whose token this is.
func (c *Client) OrderSince(ctx context.Context, id, token string) (o Order, err error) {
	_, err = c.do(ctx, http.MethodGet, c.url(nil, "orders", id), map[string]string{"Consistency-Token": token}, nil, &o)
	return o, err
}

// History lists every event of an order, fetching so many at a time (200 when 0).
func (c *Client) History(ctx context.Context, id string, limit int) iter.Seq2[HistoryEntry, error] {
	query := url.Values{}
	if limit > 0 {
		query.Set("limit", strconv.Itoa(limit))
	}
	return list[HistoryEntry](ctx, c, query, "orders", id, "history")
}

// Stocks lists the stock of every SKU.
func (c *Client) Stocks(ctx context.Context) iter.Seq2[Stock, error] {
	return list[Stock](ctx, c, nil, "stock")
}

// Stock is the stock of one SKU.
func (c *Client) Stock(ctx context.Context, sku string) (Stock, error) {
	return get[Stock](ctx, c, "stock", sku)
}

// Payment is the payment of an order.
func (c *Client) Payment(ctx context.Context, order string) (Payment, error) {
	return get[Payment](ctx, c, "payments", order)
}

// Ledger lists the balance of every account and currency.
func (c *Client) Ledger(ctx context.Context) iter.Seq2[LedgerLine, error] {
	return list[LedgerLine](ctx, c, nil, "ledger")
}

// Shipments lists shipments; an empty status means any.
func (c *Client) Shipments(ctx context.Context, status string) iter.Seq2[Shipment, error] {
	return list[Shipment](ctx, c, filter("status", status), "shipments")
}

// Sales lists the sales of every day and currency.
func (c *Client) Sales(ctx context.Context) iter.Seq2[SalesLine, error] {
	return list[SalesLine](ctx, c, nil, "sales")
}

// Projections says how far read models and policies are.
func (c *Client) Projections(ctx context.Context) (Projections, error) {
	return get[Projections](ctx, c, "projections")
}

// Resting says whether the shop is at rest as far as /projections tells: two looks at it, a moment apart, show no lag,
// no open intent and no movement between them. If not, why names what is still going on.
func (c *Client) Resting(ctx context.Context) (p Projections, why string, err error) {
	before, err := c.Projections(ctx)
	if err != nil {
		return before, "", err
	}
	if why := before.Busy(); why != "" {
		return before, why, nil
	}
	// One look is not enough: while it is taken, an event may be on its way from one service to the next.
	if err := sleep(ctx, restPause); err != nil {
		return before, "", err
	}
	p, err = c.Projections(ctx)
	if err != nil {
		return p, "", err
	}
	if why := p.Busy(); why != "" {
		return p, why, nil
	}
	if !p.SamePositions(before) {
		return p, "the read models are moving on", nil
	}
	return p, "", nil
}

const restPause = 150 * time.Millisecond

func filter(pairs ...string) url.Values {
	v := url.Values{}
	for i := 0; i < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			v.Set(pairs[i], pairs[i+1])
		}
	}
	return v
}
