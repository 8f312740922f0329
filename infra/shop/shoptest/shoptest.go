// Package shoptest is a whole shop in memory behind the HTTP API, for the tests of programs that use it from outside.
// It is made of the real aggregates and the real choreography; what it leaves out is the journal, the read side and
// everything that can go wrong there. Its policies move on a little with each GET, so tests never wait for time.
package shoptest

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"wharf/commands"
	"wharf/domain"
	"wharf/domain/inventory"
	"wharf/domain/orders"
	"wharf/domain/payments"
	"wharf/domain/shipping"
	"wharf/infra/shop"
)

// Shop is the shop. Set the fields before the first request.
type Shop struct {
	Decline  func(order string) bool               // declines its authorisation; nil: none
	Deadline time.Duration                         // of new orders; 15 minutes when 0
	Step     int                                   // public events that policies handle with each GET; 1000 when 0
	Tamper   func(path string, items any) any      // changes what a GET answers
	Faulty   func(command int) (before, after int) // statuses to fail command 1, 2, … with; 0: none, 1: hang up

	mu        sync.Mutex
	orders    service[orders.Order]
	stock     service[inventory.Stock]
	payments  service[payments.Payment]
	shipments service[shipping.Shipment]
	queue     []domain.Recorded // public events that the policies have not handled
	seq       int64
	keys      map[string]keyed
	commands  int

	views // what queries read
}

type keyed struct {
	request string
	status  int
	body    any
}

type views struct {
	placed    []string // newest first
	orderView map[string]*shop.Order
	history   map[string][]shop.HistoryEntry
	stockView map[string]*shop.Stock
	payView   map[string]*shop.Payment
	shipView  map[string]*shop.Shipment
	shipOrder []string
	ledger    map[[2]string]int64
	sales     map[[2]string]*shop.SalesLine
}

type service[S commands.State[S]] struct {
	name    string
	table   commands.Policies[S]
	streams map[string]*stream[S]
}

type stream[S any] struct {
	state   S
	version int64
}

func newService[S commands.State[S]](name string, table commands.Policies[S]) service[S] {
	return service[S]{name, table, map[string]*stream[S]{}}
}

// New is an empty shop.
func New() *Shop {
	return &Shop{
		orders:    newService("orders", commands.Orders),
		stock:     newService("inventory", commands.Inventory),
		payments:  newService("payments", commands.Payments),
		shipments: newService("shipping", commands.Shipping),
		keys:      map[string]keyed{},
		views: views{
			orderView: map[string]*shop.Order{}, history: map[string][]shop.HistoryEntry{},
			stockView: map[string]*shop.Stock{}, payView: map[string]*shop.Payment{}, shipView: map[string]*shop.Shipment{},
			ledger: map[[2]string]int64{}, sales: map[[2]string]*shop.SalesLine{},
		},
	}
}

// Start serves the shop until the test ends, and returns its URL.
func (s *Shop) Start(t interface {
	Cleanup(func())
	Helper()
}) string {
	server := httptest.NewServer(s)
	t.Cleanup(server.Close)
	return server.URL
}

// Events is how many events the shop has recorded.
func (s *Shop) Events() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.seq
}

// Commands is how many commands the shop was asked for, tries included.
func (s *Shop) Commands() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.commands
}

func do[S commands.State[S]](s *Shop, of *service[S], id string, cause domain.Position,
	decide commands.Decision[S]) (int64, error) {
	st := of.streams[id]
	if st == nil {
		st = &stream[S]{}
	}
	events, err := decide(st.state)
	if err != nil {
		return 0, err
	}
	for _, e := range events {
		data, err := domain.Encode(e)
		if err != nil {
			return 0, err
		}
		st.state = st.state.Evolve(e)
		st.version++
		of.streams[id] = st
		s.seq++
		r := domain.Recorded{
			ID: uuid.New(), Name: e.EventName(), Service: of.name, Stream: id, Version: st.version, Time: time.Now().UTC(),
			Position: domain.Position{Topic: of.name + ".events", Seq: s.seq}, Cause: cause, Data: data,
		}
		s.queue = append(s.queue, r)
		s.tell(r, e)
	}
	return st.version, nil
}

func react[S commands.State[S]](s *Shop, of *service[S], r domain.Recorded) {
	reactions, err := of.table.React(r)
	if err != nil {
		panic(err)
	}
	for _, reaction := range reactions {
		if _, err := do(s, of, reaction.Stream, r.Position, reaction.Decide); err != nil {
			if refusal := (*domain.Refusal)(nil); !errors.As(err, &refusal) {
				panic(err)
			}
		}
	}
}

// advance lets the policies handle n events, and the provider answer.
func (s *Shop) advance(n int) {
	for ; n > 0 && len(s.queue) > 0; n-- {
		r := s.queue[0]
		s.queue = s.queue[1:]
		react(s, &s.orders, r)
		react(s, &s.stock, r)
		react(s, &s.payments, r)
		react(s, &s.shipments, r)
		if r.Service != "payments" {
			continue
		}
		for _, intent := range slices.Clone(s.payments.streams[r.Stream].state.Intents) {
			declined := intent.Kind == payments.Authorize && s.Decline != nil && s.Decline(r.Stream)
			answer := payments.Answer{Approved: !declined, Reference: "r", Reason: "declined"}
			_, _ = do(s, &s.payments, r.Stream, domain.Position{}, func(p payments.Payment) ([]domain.Event, error) {
				return p.DecideSettle(intent, answer)
			})
		}
	}
}

// ServeHTTP serves the API of the shop.
func (s *Shop) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	s.mu.Lock()
	defer s.mu.Unlock()
	var path []string
	for _, segment := range strings.Split(strings.Trim(r.URL.EscapedPath(), "/"), "/") {
		plain, err := url.PathUnescape(segment)
		if err != nil {
			problem(w, http.StatusBadRequest, "malformed", "the path")
			return
		}
		path = append(path, plain)
	}
	if r.Method == http.MethodGet {
		s.advance(cmp.Or(s.Step, 1000))
		s.query(w, r, path)
		return
	}
	s.commands++
	before, after := 0, 0
	if s.Faulty != nil {
		before, after = s.Faulty(s.commands)
	}
	if fail(w, before) {
		return
	}
	key := r.Header.Get("Idempotency-Key")
	request := r.Method + strings.Join(path, "/") + string(body)
	old, known := s.keys[key]
	switch {
	case known && old.request != request:
		problem(w, http.StatusUnprocessableEntity, "idempotency-key-reused", "")
		return
	case !known:
		status, answer := s.command(key, path, body)
		old = keyed{request, status, answer}
		if key != "" && status != http.StatusNotFound {
			s.keys[key] = old
		}
	}
	if fail(w, after) {
		return
	}
	if old.status >= 400 {
		problem(w, old.status, old.body.(string), "")
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(old.status)
	_ = json.NewEncoder(w).Encode(old.body)
}

func fail(w http.ResponseWriter, status int) bool {
	switch status {
	case 0:
		return false
	case 1:
		panic(http.ErrAbortHandler)
	}
	problem(w, status, "conflict", "try again")
	return true
}

func problem(w http.ResponseWriter, status int, code, detail string) {
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]any{
		"type": "urn:wharf:problem:" + code, "title": http.StatusText(status), "status": status, "detail": detail,
	})
}

func (s *Shop) command(key string, path []string, body []byte) (int, any) {
	var in struct {
		Customer          string        `json:"customer"`
		Lines             []orders.Line `json:"lines"`
		Reason            string        `json:"reason"`
		Quantity, Delta   int64
		Carrier, Tracking string
		Amount            domain.Money
	}
	if len(body) > 0 {
		d := json.NewDecoder(bytes.NewReader(body))
		d.DisallowUnknownFields()
		if err := d.Decode(&in); err != nil {
			return http.StatusBadRequest, "malformed"
		}
	}
	var version int64
	var err error
	status, none := http.StatusOK, domain.Position{}
	id := ""
	if len(path) > 1 {
		id = path[1]
	}
	switch route := path[0] + "/" + path[len(path)-1]; route {
	case "orders/orders":
		if in.Customer == "" || len(in.Lines) == 0 || len(in.Lines) > 2000 {
			return http.StatusUnprocessableEntity, "invalid"
		}
		status = http.StatusCreated
		id = uuid.NewSHA1(uuid.NameSpaceURL, []byte(cmp.Or(key, uuid.NewString()))).String()
		deadline := time.Now().Add(cmp.Or(s.Deadline, 15*time.Minute)).UTC()
		version, err = do(s, &s.orders, id, none, func(o orders.Order) ([]domain.Event, error) {
			return o.DecidePlace(in.Customer, in.Lines, deadline)
		})
	case "orders/cancel":
		version, err = do(s, &s.orders, id, none, func(o orders.Order) ([]domain.Event, error) {
			return o.DecideCancel(in.Reason)
		})
	case "stock/receive":
		version, err = do(s, &s.stock, id, none, func(o inventory.Stock) ([]domain.Event, error) {
			return o.DecideReceive(in.Quantity)
		})
	case "stock/adjust":
		version, err = do(s, &s.stock, id, none, func(o inventory.Stock) ([]domain.Event, error) {
			return o.DecideAdjust(in.Delta, in.Reason)
		})
	case "shipments/dispatch":
		version, err = do(s, &s.shipments, id, none, func(o shipping.Shipment) ([]domain.Event, error) {
			return o.DecideDispatch(in.Carrier, in.Tracking)
		})
	case "shipments/deliver":
		version, err = do(s, &s.shipments, id, none, shipping.Shipment.DecideDeliver)
	case "payments/refund":
		status = http.StatusAccepted
		version, err = do(s, &s.payments, id, none, func(o payments.Payment) ([]domain.Event, error) {
			return o.DecideRefund(uuid.NewSHA1(uuid.NameSpaceURL, []byte(key)), in.Amount)
		})
	default:
		return http.StatusNotFound, "no-such-path"
	}
	refusal := (*domain.Refusal)(nil)
	switch {
	case errors.Is(err, domain.ErrUnknown):
		return http.StatusNotFound, "unknown"
	case errors.As(err, &refusal):
		return http.StatusConflict, refusal.Code
	case err != nil:
		return http.StatusUnprocessableEntity, "invalid"
	}
	return status, map[string]any{"id": id, "version": version, "more": "than a client knows"}
}

// tell folds an event into what queries read.
func (s *Shop) tell(r domain.Recorded, event domain.Event) {
	entry := shop.HistoryEntry{
		ID: r.ID.String(), Type: r.Name, Service: r.Service, Time: r.Time, Version: r.Version,
		Position: r.Position.String(), Cause: r.Cause.String(), Data: r.Data,
	}
	order := r.Stream
	if o := s.orderView[r.Stream]; o != nil && r.Service == "orders" {
		o.Status, o.Version, o.UpdatedAt = s.orders.streams[r.Stream].state.Status, r.Version, r.Time
	}
	switch e := event.(type) {
	case orders.Placed:
		s.placed = slices.Insert(s.placed, 0, r.Stream)
		s.orderView[r.Stream] = &shop.Order{
			ID: r.Stream, Customer: e.Customer, Status: orders.StatusPlaced, Lines: e.Lines, Total: e.Total,
			Version: r.Version, PlacedAt: r.Time, UpdatedAt: r.Time,
		}
	case orders.Rejected:
		s.orderView[r.Stream].Reason = e.Reason
	case orders.Shipped:
		line := s.salesOf(r, e.Total.Currency)
		line.Orders++
		for _, item := range e.Items {
			line.Units += item.Quantity
		}
	}
	switch r.Service {
	case "inventory":
		v := s.stockView[r.Stream]
		if v == nil {
			v = &shop.Stock{SKU: r.Stream}
			s.stockView[r.Stream] = v
		}
		v.Version = r.Version
		order = ""
		switch e := event.(type) {
		case inventory.Received:
			v.Received += e.Quantity
			v.Available += e.Quantity
		case inventory.Adjusted:
			v.Adjusted += e.Delta
			v.Available += e.Delta
		case inventory.Reserved:
			v.Available -= e.Quantity
			v.Reserved += e.Quantity
			order = e.Order.String()
		case inventory.ReservationRejected:
			order = e.Order.String()
		case inventory.Released:
			v.Available += e.Quantity
			v.Reserved -= e.Quantity
			order = e.Order.String()
		case inventory.Shipped:
			v.Reserved -= e.Quantity
			v.Shipped += e.Quantity
			order = e.Order.String()
		}
	case "payments":
		s.tellPayment(r, event)
	case "shipping":
		v := s.shipView[r.Stream]
		if v == nil {
			v = &shop.Shipment{Order: r.Stream}
			s.shipView[r.Stream] = v
			s.shipOrder = append(s.shipOrder, r.Stream)
		}
		state := s.shipments.streams[r.Stream].state
		v.Status, v.Version, v.Carrier, v.Tracking = string(state.Status), r.Version, state.Carrier, state.Tracking
		s.orderView[r.Stream].Shipment = shop.Part{Status: v.Status, Version: r.Version}
	}
	if order != "" {
		s.history[order] = append(s.history[order], entry)
	}
}

func (s *Shop) tellPayment(r domain.Recorded, event domain.Event) {
	v := s.payView[r.Stream]
	if v == nil {
		v = &shop.Payment{Order: r.Stream}
		s.payView[r.Stream] = v
	}
	state := s.payments.streams[r.Stream].state
	money := func(n int64) domain.Money { return domain.Money{Amount: n, Currency: state.Currency} }
	v.Status, v.Version = state.Status, r.Version
	v.Authorized, v.Captured = money(state.Authorized), money(state.Captured)
	v.Refunded, v.Pending = money(state.Refunded), money(state.Pending)
	s.orderView[r.Stream].Payment = shop.Part{Status: string(state.Status), Version: r.Version}
	var m shop.Movement
	if err := json.Unmarshal(r.Data, &m); err != nil {
		panic(err)
	}
	m.ID, m.Type, m.Time = r.ID.String(), r.Name, r.Time
	v.Movements = append(v.Movements, m)
	for _, p := range m.Postings {
		s.ledger[[2]string{p.Account, p.Amount.Currency}] += p.Amount.Amount
	}
	switch e := event.(type) {
	case payments.Captured:
		s.salesOf(r, e.Amount.Currency).Revenue.Amount += e.Amount.Amount
	case payments.Refunded:
		s.salesOf(r, e.Amount.Currency).Revenue.Amount -= e.Amount.Amount
	}
}

func (s *Shop) salesOf(r domain.Recorded, currency string) *shop.SalesLine {
	day := [2]string{r.Time.Format(time.DateOnly), currency}
	if s.sales[day] == nil {
		s.sales[day] = &shop.SalesLine{Date: day[0], Revenue: domain.Money{Currency: currency}}
	}
	return s.sales[day]
}

func (s *Shop) query(w http.ResponseWriter, r *http.Request, path []string) {
	q := r.URL.Query()
	var one any
	var all []any
	switch path[0] {
	case "orders":
		switch {
		case len(path) == 1:
			for _, id := range s.placed {
				o := *s.orderView[id]
				o.Lines = nil
				if (q.Get("status") == "" || q.Get("status") == string(o.Status)) &&
					(q.Get("customer") == "" || q.Get("customer") == o.Customer) {
					all = append(all, &o)
				}
			}
		case s.orderView[path[1]] == nil:
			problem(w, http.StatusNotFound, "unknown", "")
			return
		case len(path) == 3:
			for _, e := range s.history[path[1]] {
				all = append(all, &e)
			}
		default:
			one = *s.orderView[path[1]]
		}
	case "stock":
		if len(path) == 1 {
			for _, sku := range slices.Sorted(maps.Keys(s.stockView)) {
				v := *s.stockView[sku]
				all = append(all, &v)
			}
		} else if v := s.stockView[path[1]]; v != nil {
			one = *v
		}
	case "payments":
		if v := s.payView[path[1]]; v != nil {
			one = *v
		}
	case "shipments":
		for _, id := range s.shipOrder {
			if v := *s.shipView[id]; q.Get("status") == "" || q.Get("status") == v.Status {
				all = append(all, &v)
			}
		}
	case "ledger":
		for k, v := range s.ledger {
			all = append(all, &shop.LedgerLine{Account: k[0], Balance: domain.Money{Amount: v, Currency: k[1]}})
		}
	case "sales":
		for _, v := range s.sales {
			line := *v
			all = append(all, &line)
		}
	case "projections":
		lag := int64(len(s.queue))
		one = map[string]any{
			"items": []any{
				map[string]any{"name": "orders", "build": 2, "version": 1, "state": "live", "lag": 0,
					"position": map[string]int64{"orders.events": s.seq}},
				map[string]any{"name": "orders", "build": 3, "version": 2, "state": "building", "lag": 99,
					"position": map[string]int64{}},
			},
			"policies":     []any{map[string]any{"service": "orders", "lag": lag}},
			"open_intents": 0,
		}
	}
	list := one == nil && (len(path) == 1 || path[len(path)-1] == "history")
	if !list && one == nil {
		problem(w, http.StatusNotFound, "unknown", "")
		return
	}
	if list {
		limit, _ := strconv.Atoi(cmp.Or(q.Get("limit"), "50"))
		limit = min(limit, 200)
		from, _ := strconv.Atoi(q.Get("cursor"))
		if to := from + limit; to < len(all) {
			q.Set("cursor", strconv.Itoa(to))
			w.Header().Set("Link", fmt.Sprintf(`<%s?%s>; rel="next"`, r.URL.EscapedPath(), q.Encode()))
			all = all[:to]
		}
		if all = all[min(from, len(all)):]; all == nil {
			all = []any{}
		}
		one = map[string]any{"items": all}
	}
	if s.Tamper != nil {
		one = s.Tamper(r.URL.Path, one)
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(one)
}
