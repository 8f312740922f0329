package projections

import (
	"context"
	"net/http"

	"github.com/danielgtaylor/huma/v2"
	"github.com/jackc/pgx/v5"

	"wharf/domain"
	"wharf/domain/payments"
)

// Ledger is the balance of every account and currency. Payments of all partitions post to the same accounts, so each
// partition has rows of its own, and the query sums them.
var Ledger = Define(Spec[ledgerKey, ledgerRow]{
	Name: "ledger", Version: 1,
	Events: map[string]domain.Events{PaymentsTopic: domain.EventsOf(
		payments.Authorized{}, payments.Captured{}, payments.Voided{}, payments.Refunded{})},
	Keys: func(e Event) (keys []ledgerKey) {
		seen := map[ledgerKey]bool{}
		for _, p := range postings(e) {
			k := ledgerKey{e.Partition, p.Account, p.Amount.Currency}
			if !seen[k] {
				seen[k] = true
				keys = append(keys, k)
			}
		}
		return keys
	},
	Apply: func(k ledgerKey, l ledgerRow, e Event) ledgerRow {
		for _, p := range postings(e) {
			if p.Account == k.Account && p.Amount.Currency == k.Currency {
				l.Balance += p.Amount.Amount
			}
		}
		return l
	},
})

type ledgerKey struct {
	Partition int32  `db:"partition int"`
	Account   string `db:"account text"`
	Currency  string `db:"currency text"`
}

type ledgerRow struct {
	Balance int64 `db:"balance bigint"`
}

// LedgerLine is the balance of one account in one currency as the API shows it.
type LedgerLine struct {
	Account string       `json:"account"`
	Balance domain.Money `json:"balance" doc:"Positive: a debit. All balances of a currency sum to zero."`
	Stale   bool         `json:"stale,omitempty" doc:"True while events could not be applied that may belong here."`
}

func scanLedger(row pgx.Row) (l LedgerLine, err error) {
	err = row.Scan(&l.Account, &l.Balance.Currency, &l.Balance.Amount, &l.Stale)
	return l, err
}

type ledgerList struct {
	Consistency
	Page[ledgerCursor]
}

type ledgerCursor struct {
	Account  string `json:"account"`
	Currency string `json:"currency"`
}

func registerLedger(api huma.API, db Reads) {
	read(api, db, Ledger, huma.Operation{
		OperationID: "list-ledger", Method: http.MethodGet, Path: "/ledger",
		Summary: "The balance of every account and currency", Description: "By account and currency.",
		Tags: []string{"payments"},
	}, func(ctx context.Context, in *ledgerList) (*List[LedgerLine], error) {
		q := newQuery("SELECT account, currency, sum(balance)::bigint, bool_or(stale) FROM wharf_read.ledger")
		q.group = "account, currency"
		return list(ctx, db, in.Page, q, keyset[LedgerLine, ledgerCursor]{
			scan:   scanLedger,
			after:  func(c ledgerCursor) { q.where("(account, currency) > (?, ?)", c.Account, c.Currency) },
			order:  "account, currency",
			cursor: func(l LedgerLine) ledgerCursor { return ledgerCursor{l.Account, l.Balance.Currency} },
		})
	})
}
