package session

import (
	"fmt"
	"testing"

	"github.com/culvert-dev/culvert/daemon/api"
)

// Ports of the agent's pod are left one by one, whatever opened them; a Service's
// stay together.
func TestPortsOf(t *testing.T) {
	ports := []api.InterceptPort{{Port: 8080, Protocol: "TCP"}, {Port: 9091, Protocol: "TCP"}, {Port: 9091, Protocol: "UDP"}}
	for _, c := range []struct {
		kind string
		req  api.LeaveRequest
		left int
		stay int
	}{
		{api.KindExpose, api.LeaveRequest{Service: "8080"}, 1, 2},
		{api.KindExpose, api.LeaveRequest{Service: "9091"}, 2, 1},
		{api.KindExpose, api.LeaveRequest{All: true}, 3, 0},
		{api.KindExchange, api.LeaveRequest{Service: "cart"}, 3, 0},
		{api.KindPreview, api.LeaveRequest{Service: "cart"}, 3, 0},
	} {
		i := &intercepted{saved: saved{Request: api.InterceptRequest{Kind: c.kind}, Service: "cart", Ports: ports}}
		left, stay := i.portsOf(c.req)
		if len(left) != c.left || len(stay) != c.stay || c.kind == api.KindExpose && !c.req.All && fmt.Sprint(left[0].Port) != c.req.Service {
			t.Errorf("%s, %+v: left %v, stay %v", c.kind, c.req, left, stay)
		}
	}
}
