def text(): return ''
