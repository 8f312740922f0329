package projections

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math"
	"reflect"
	"time"

	fastjson "github.com/go-json-experiment/json/v1"
	"github.com/google/uuid"
)

// AppendCopy is what Values is to INSERT: a row as COPY … (FORMAT binary) takes it. (It is not made of Values, because most
// of the time that a row takes on its way to the database is spent on turning each value into an interface and back.)
func (t rows[K, R]) AppendCopy(to []byte, key, row any) ([]byte, error) {
	k := key.(K)
	to = binary.BigEndian.AppendUint16(to, uint16(len(t.key)+len(t.row)))
	for _, part := range []struct {
		fields []field
		of     reflect.Value
	}{{t.key, reflect.ValueOf(&k).Elem()}, {t.row, reflect.ValueOf(row).Elem()}} {
		for _, f := range part.fields {
			length := len(to)
			to = append(to, 0, 0, 0, 0)
			var err error
			if to, err = f.encode(to, part.of.Field(f.index)); err != nil {
				return nil, fmt.Errorf("a row of %s: %s: %w", t.spec.Name, f.column.Name, err)
			}
			binary.BigEndian.PutUint32(to[length:], uint32(len(to)-length-4))
		}
	}
	return to, nil
}

// encoder appends a field, which can be addressed, in the binary format of its column's type.
type encoder func(to []byte, field reflect.Value) ([]byte, error)

// encoderOf is nil when a column of the type, which is given without a length, cannot hold such fields.
func encoderOf(field reflect.Type, column string) encoder {
	text := column == "text" || column == "varchar"
	switch {
	case column == "json" && field == reflect.TypeFor[json.RawMessage]():
		return func(to []byte, v reflect.Value) ([]byte, error) { return append(to, v.Bytes()...), nil }
	case column == "json":
		return func(to []byte, v reflect.Value) ([]byte, error) {
			data, err := fastjson.Marshal(v.Addr().Interface())
			return append(to, data...), err
		}
	case text && field.Kind() == reflect.String:
		return func(to []byte, v reflect.Value) ([]byte, error) { return append(to, v.String()...), nil }
	case column == "bigint" && reflect.Zero(field).CanInt():
		return func(to []byte, v reflect.Value) ([]byte, error) {
			return binary.BigEndian.AppendUint64(to, uint64(v.Int())), nil
		}
	case column == "int" && reflect.Zero(field).CanInt():
		return func(to []byte, v reflect.Value) ([]byte, error) {
			if n := v.Int(); n < math.MinInt32 || n > math.MaxInt32 {
				return nil, fmt.Errorf("%d is no int", n)
			}
			return binary.BigEndian.AppendUint32(to, uint32(v.Int())), nil
		}
	case column == "bool" && field.Kind() == reflect.Bool:
		return func(to []byte, v reflect.Value) ([]byte, error) {
			if v.Bool() {
				return append(to, 1), nil
			}
			return append(to, 0), nil
		}
	case column == "uuid" && field == reflect.TypeFor[uuid.UUID]():
		return func(to []byte, v reflect.Value) ([]byte, error) { return append(to, v.Bytes()...), nil }
	case column == "timestamptz" && field == reflect.TypeFor[time.Time]():
		return func(to []byte, v reflect.Value) ([]byte, error) {
			at := v.Addr().Interface().(*time.Time).UnixMicro() - year2000
			return binary.BigEndian.AppendUint64(to, uint64(at)), nil
		}
	}
	return nil
}

// year2000 is where Postgres counts its microseconds from.
var year2000 = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC).UnixMicro()
