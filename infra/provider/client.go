package provider

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"go.opentelemetry.io/contrib/instrumentation/net/http/otelhttp"
)

// maxAnswer bounds what the client reads of an answer, in bytes.
const maxAnswer = 64 << 10

// Client asks a payment provider. It is safe for concurrent use, and keeps connections open.
type Client struct {
	base string
	http http.Client
}

// NewClient asks the provider at baseURL (such as "http://127.0.0.1:8085"), each try within timeout.
func NewClient(baseURL string, timeout time.Duration) *Client {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.MaxIdleConnsPerHost = 64
	return &Client{strings.TrimRight(baseURL, "/"), http.Client{
		Transport: otelhttp.NewTransport(t),
		Timeout:   timeout,
		// A redirect is no answer, and would repeat the request as a GET.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// Close drops idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Do asks once. An error means that there was no final word (no connection, no answer in time, a 5xx): the deed may be
// done or not, and only asking again, with the same Request, tells. A decline is an Answer.
func (c *Client) Do(ctx context.Context, r Request) (Answer, error) {
	answer, err := c.do(ctx, r)
	if err != nil {
		return Answer{}, fmt.Errorf("ask the payment provider to %s: %w", r.Kind, err)
	}
	return answer, nil
}

func (c *Client) do(ctx context.Context, r Request) (answer Answer, err error) {
	path, known := paths[r.Kind]
	if !known {
		return answer, errors.New("there is no such kind of request")
	}
	if r.Kind == Authorize {
		r.AuthorizationKey = ""
	}
	data, err := json.Marshal(body{r.Order, r.AuthorizationKey, r.Amount})
	if err != nil {
		return answer, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.base+path, bytes.NewReader(data))
	if err != nil {
		return answer, err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Idempotency-Key", r.Key)
	resp, err := c.http.Do(req)
	if err != nil {
		return answer, err
	}
	defer resp.Body.Close()
	// Read all of it, so that the connection can be used again.
	data, err = io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return answer, fmt.Errorf("read the answer: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		var p struct{ Detail string }
		_ = json.Unmarshal(data, &p) // a proxy's error page has none
		return answer, fmt.Errorf("it answered %s: %s", resp.Status, p.Detail)
	}
	var final struct {
		Approved          *bool // a pointer, so that what is no answer at all is not taken for a decline
		Reference, Reason string
	}
	if err := json.Unmarshal(data, &final); err != nil {
		return answer, fmt.Errorf("read the answer: %w", err)
	}
	if final.Approved == nil {
		return answer, errors.New("the answer does not say what was decided")
	}
	return Answer{*final.Approved, final.Reference, final.Reason}, nil
}
