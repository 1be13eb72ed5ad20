package carrier

import (
	"testing"

	"golang.zx2c4.com/wireguard/conn"
)

func TestBindAllocatesNothing(t *testing.T) {
	s, g := pair(t, false)
	from, to := NewBind(BindConfig{}), NewBind(BindConfig{})
	open(t, from)
	fn := open(t, to)
	from.Attach(s)
	to.Attach(g)
	t.Cleanup(func() { from.Shutdown(); to.Shutdown() })
	bufs, sizes := wgBuffers(conn.IdealBatchSize, 65535)
	eps := make([]conn.Endpoint, len(bufs))
	msgs := [][]byte{make([]byte, 60000), make([]byte, 100)}
	if n := testing.AllocsPerRun(200, func() {
		if err := from.Send(msgs, &from.ep); err != nil {
			t.Fatal(err)
		}
		for got := 0; got < len(msgs); {
			n, err := fn(bufs, sizes, eps)
			if err != nil {
				t.Fatal(err)
			}
			got += n
		}
	}); n > 0 {
		t.Errorf("%v allocations per batch", n)
	}
}
