package session

import (
	"github.com/culvert-dev/culvert/daemon/api"
)

// resume takes over what the process before this one had begun: what was active
// goes on, what was not is undone.
func (x *intercepts) resume(list []saved) {
	for _, one := range list {
		i := &intercepted{saved: one, state: api.InterceptActive}
		x.mu.Lock()
		x.kept = true
		x.all[i.ID] = i
		x.mu.Unlock()
		switch {
		case !i.Active:
			x.begin(i, x.undoLoop)
		case i.Request.Kind == api.KindExpose:
			x.serve(i)
		default:
			x.serve(i)
			x.begin(i, x.keep)
		}
	}
}
