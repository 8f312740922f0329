// Package provider answers the question "what does the outside world do when it is asked for money?". It is a
// stand-in for a payment provider (Server, a program of its own) and the client that the payments service asks it with
// (Client). Read this file first: what a provider promises, and how this one can be made to misbehave.
//
// # The API
//
// POST /authorizations, /captures, /voids and /refunds, each with an Idempotency-Key (visible ASCII, up to 255) and
//
//	{"order": "…", "authorization": "<key of the authorisation>", "amount": {"amount": 255, "currency": "GBP"}}
//
// where an authorisation has no "authorization" (its own key names it) and a void carries the amount that the
// authorisation was asked for. The answer is 200 with {"approved", "reference", "reason"}: a decline is an answer, not
// an error. The same key with the same request gets the same answer for ever; with another request it gets 422. An
// authorisation is captured at most once and for no more than was authorised; refunds never exceed what was captured;
// a void names the authorisation by its key and so bars one that has not arrived yet, which is then declined.
//
// # Faults
//
// Faults are drawn by chance (type Faults, the stand-in's flags), or chosen by an order: in the test currency XTS the
// last two digits of the amount that was authorised say what happens to the order's requests. In every other currency
// no amount means anything.
//
//	XTS …01  the authorisation is declined
//	XTS …02  the authorisation is done, but its first try is never answered
//	XTS …03  the authorisation's first try is answered 2 s late
//	XTS …04  the authorisation is done, but its first two tries are answered 500 (so it is asked for again and again)
//	XTS …05  the capture is declined
//	XTS …06  refunds are declined
//	XTS …07  the capture is done, but its first try is never answered
//	XTS …08  the void is done, but its first try is never answered
//	XTS …09  a refund is done, but its first try is never answered
//	XTS …10  the capture is done, but its first two tries are answered 500
//	XTS …11  the first two tries of every request are answered 503, and nothing is done
//	XTS …12  the authorisation's first try is answered 10 s late
//	XTS else all is approved
package provider

import (
	"math/rand/v2"
	"time"

	"github.com/google/uuid"

	"wharf/domain"
)

// The kinds of requests.
const (
	Authorize = "authorize"
	Capture   = "capture"
	Void      = "void"
	Refund    = "refund"
)

var paths = map[string]string{
	Authorize: "/authorizations", Capture: "/captures", Void: "/voids", Refund: "/refunds",
}

// Request is one thing asked of the provider.
type Request struct {
	Kind             string
	Key              string // names the request for ever: the same for every try
	AuthorizationKey string // the Key of the authorisation that a capture, void or refund is about
	Order            string
	Amount           domain.Money // of a void: what the authorisation was asked for
}

// Answer is the provider's final word on a request.
type Answer struct {
	Approved  bool   `json:"approved"`
	Reference string `json:"reference"`        // the provider's name for the deed, empty when declined
	Reason    string `json:"reason,omitempty"` // of a decline
}

// Faults is what goes wrong by chance. Rates are between 0 (never) and 1 (always), each drawn for every try.
type Faults struct {
	Decline float64       // new authorisations that are declined
	Timeout float64       // requests that are done and never answered
	Slow    float64       // requests that are answered after Delay
	Repeat  float64       // requests that are done and answered 500, so that they come again
	Delay   time.Duration // of slow answers
}

// fault is what an order in the test currency asks for, for one kind of request. The numbers count tries.
type fault struct {
	decline bool
	silent  int // so many are done and never answered
	failing int // so many are done and answered 500
	absent  int // so many are not done and answered 503
	late    time.Duration
}

const testCurrency = "XTS"

// chosen is the fault for a request about an authorisation of that amount. It is the table of the package comment.
func chosen(kind string, authorized domain.Money) fault {
	if authorized.Currency != testCurrency {
		return fault{}
	}
	type row struct {
		kind string // any if empty
		fault
	}
	r := map[int64]row{
		1:  {Authorize, fault{decline: true}},
		2:  {Authorize, fault{silent: 1}},
		3:  {Authorize, fault{late: 2 * time.Second}},
		4:  {Authorize, fault{failing: 2}},
		5:  {Capture, fault{decline: true}},
		6:  {Refund, fault{decline: true}},
		7:  {Capture, fault{silent: 1}},
		8:  {Void, fault{silent: 1}},
		9:  {Refund, fault{silent: 1}},
		10: {Capture, fault{failing: 2}},
		11: {"", fault{absent: 2}},
		12: {Authorize, fault{late: 10 * time.Second}},
	}[authorized.Amount%100]
	if r.kind != "" && r.kind != kind {
		return fault{}
	}
	return r.fault
}

func chance(rate float64) bool { return rate > 0 && rand.Float64() < rate }

// deed is a request with its answer: the provider's whole memory is the list of its deeds.
type deed struct {
	Request
	Answer
}

// authorization is what the deeds about one authorisation come to.
type authorization struct {
	asked    domain.Money
	approved bool
	barred   bool // by a void, perhaps before it was asked for
	captured int64
	refunded int64
}

// books is the state of the provider: a fold of deeds.
type books struct {
	deeds          map[string]deed // by key
	authorizations map[string]authorization
}

func newBooks() books {
	return books{map[string]deed{}, map[string]authorization{}}
}

// authorizationOf is the authorisation that the request is about, and its key.
func (b books) authorizationOf(r Request) (string, authorization) {
	key := r.AuthorizationKey
	if r.Kind == Authorize {
		key = r.Key
	}
	a, known := b.authorizations[key]
	if !known {
		a.asked = r.Amount
	}
	return key, a
}

// decide is the answer to a request that has not been answered before.
func (b books) decide(r Request, decline bool) Answer {
	_, a := b.authorizationOf(r)
	held := a.approved && !a.barred && a.captured == 0
	sameCurrency := r.Amount.Currency == a.asked.Currency
	reason := ""
	switch {
	case r.Kind == Authorize && a.barred:
		reason = "the authorisation was voided before it arrived"
	case r.Kind == Void && a.captured > 0:
		reason = "the authorisation was captured"
	case r.Kind == Capture && !held:
		reason = "nothing is authorised that could be captured"
	case r.Kind == Capture && (!sameCurrency || r.Amount.Amount > a.asked.Amount):
		reason = "the capture exceeds the authorisation"
	case r.Kind == Refund && (!sameCurrency || r.Amount.Amount > a.captured-a.refunded):
		reason = "the refund exceeds what was captured"
	case decline:
		reason = "declined by the card's issuer"
	}
	if reason != "" {
		return Answer{Reason: reason}
	}
	// The reference comes from the key, so that it is the same whoever computes it and whenever.
	return Answer{Approved: true, Reference: r.Kind + "-" + uuid.NewSHA1(uuid.NameSpaceOID, []byte(r.Key)).String()}
}

// add folds one more deed in.
func (b books) add(d deed) {
	b.deeds[d.Key] = d
	key, a := b.authorizationOf(d.Request)
	switch {
	case d.Kind == Authorize:
		a.asked, a.approved = d.Amount, d.Approved
	case !d.Approved:
		return
	case d.Kind == Void:
		a.barred = true
	case d.Kind == Capture:
		a.captured = d.Amount.Amount
	case d.Kind == Refund:
		a.refunded += d.Amount.Amount
	}
	b.authorizations[key] = a
}
