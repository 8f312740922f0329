//go:build bench

package bench_test

import (
	"testing"

	"github.com/google/uuid"
	"wharf/infra/postgres"
	"wharf/projections"
)

func TestProf2(t *testing.T) {
	l := tellOrders(t, 3000)
	pool := newDatabase(t)
	l.project(t, pool, projections.Orders)
	q, err := postgres.OpenQuery(t.Context(), pool.Config().ConnString())
	if err != nil {
		t.Fatal(err)
	}
	for _, sql := range []string{
		`SELECT customer, lines FROM wharf_read.orders WHERE id = $1`,
		`SELECT customer, lines, stale FROM wharf_read.orders WHERE id = $1`,
		`SELECT id, customer, status, reason, total, currency, payment->>'Status', payment_version,
	shipment_status, shipment_version, version, placed_at, updated_at, lines FROM wharf_read.orders WHERE version > 0 AND id = $1`,
		`SELECT id, customer, status, reason, total, currency, payment->>'Status', payment_version,
	shipment_status, shipment_version, version, placed_at, updated_at, stale, lines FROM wharf_read.orders WHERE version > 0 AND id = $1`,
	} {
		s, err := drive(closed(16), func(w int) error {
			rows, err := q.Query(t.Context(), sql, l.orders[w])
			if err != nil {
				return err
			}
			for rows.Next() {
				_ = rows.RawValues()
			}
			return rows.Err()
		})
		t.Log(s, err, sql[:40])
		s, err = drive(closed(16), func(w int) error {
			rows, err := q.Query(t.Context(), sql, [16]byte(l.orders[w]))
			if err != nil {
				return err
			}
			for rows.Next() {
				_ = rows.RawValues()
			}
			return rows.Err()
		})
		t.Log(s, err, "bytes")
	}
	_ = uuid.Nil
	q.Close()
}
